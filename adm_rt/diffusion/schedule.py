"""Noise schedules and respaced processes as float64 tables. NumPy only.

Sources: DDPM (arXiv 2006.11239) section 2 for the posterior, Improved DDPM (arXiv 2102.09672)
section 3.2 for the cosine schedule and section 4 for fewer steps. Tables are indexed by the
position ``i`` in the (possibly respaced) process, ``i = 0`` being the least noisy; the network is
always told the timestep of the original process, see :meth:`Diffusion.model_timestep`.
"""

from __future__ import annotations

import difflib
import math
import numbers

import numpy as np

NOISE_SCHEDULES = ("linear", "cosine")

_COSINE_OFFSET = 0.008
_COSINE_MAX_BETA = 0.999


def betas_of(noise_schedule: str, steps: int) -> np.ndarray:
    """The variances beta_t, float64 [steps], of a schedule scaled to ``steps`` steps.

    ``linear`` runs from 1e-4 to 2e-2 times 1000/steps; ``cosine`` is capped at 0.999.
    """
    if noise_schedule == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=np.float64)
        if betas[-1] >= 1:
            raise ValueError(
                f"steps={steps} is too few for noise_schedule='linear', whose last beta would be "
                f"{betas[-1]:.3g} (it must stay below 1). Use steps >= 21, or 'cosine', or "
                "steps=1000 with timestep_respacing for a short process."
            )
        return betas
    if noise_schedule == "cosine":

        def alpha_bar(u):
            return math.cos((u + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2

        return np.array(
            [
                min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), _COSINE_MAX_BETA)
                for i in range(steps)
            ],
            dtype=np.float64,
        )
    near = difflib.get_close_matches(str(noise_schedule), NOISE_SCHEDULES, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"noise_schedule={noise_schedule!r} is not one of {NOISE_SCHEDULES}.{hint}")


def ddim_step_counts(steps: int) -> list[int]:
    """All N for which ``"ddimN"`` exists: the lengths of ``range(0, steps, stride)``, ascending."""
    return sorted({len(range(0, steps, stride)) for stride in range(1, steps)})


def respaced_timesteps(steps: int, respacing: str | int = "") -> np.ndarray:
    """The original timesteps kept by a respacing string, ascending int64.

    ``""`` keeps all. ``"N"`` or ``"a,b,..."`` splits ``range(steps)`` into as many sections as
    there are numbers, the first one starting at t=0, and keeps that many evenly spaced steps of
    each section, both ends included. ``"ddimN"`` uses the smallest integer stride that gives
    exactly N steps, as in the DDIM paper; it starts at 0 and need not reach the last step.

    Raises ValueError, naming the nearest valid string, if no such process exists.
    """
    if isinstance(respacing, bool) or not isinstance(respacing, (str, numbers.Integral)):
        raise TypeError(
            f"timestep_respacing must be a string such as '25', 'ddim25' or '90,60,60,20,20' (or "
            f"an int), not {type(respacing).__name__} {respacing!r}."
        )
    text = str(respacing).strip()
    if text == "":
        return np.arange(steps, dtype=np.int64)
    if text.startswith("ddim"):
        return _ddim_timesteps(steps, text)

    counts = [_count(part, text, steps) for part in text.split(",")]
    if len(counts) > steps:
        raise ValueError(
            f"timestep_respacing={text!r} has {len(counts)} sections, but the process has only "
            f"{steps} steps."
        )
    size, extra = divmod(steps, len(counts))
    sections = [size + (1 if index < extra else 0) for index in range(len(counts))]
    kept: list[int] = []
    start = 0
    for index, (count, section) in enumerate(zip(counts, sections, strict=True)):
        if not 1 <= count <= section:
            fixed = ",".join(str(min(max(c, 1), s)) for c, s in zip(counts, sections, strict=True))
            where = f"section {index + 1} of " if len(counts) > 1 else ""
            raise ValueError(
                f"timestep_respacing={text!r} asks for {count} steps of {where}a process with "
                f"{section} there; use 1 to {section}. Nearest valid: {fixed!r}."
            )
        # The stride is added up in floating point and rounded half to even: released models were
        # sampled with exactly these timesteps, and multiplying instead differs for some counts.
        stride = (section - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += section
    return np.array(sorted(set(kept)), dtype=np.int64)


def _count(part: str, text: str, steps: int) -> int:
    try:
        return int(part)
    except ValueError:
        raise ValueError(
            f"timestep_respacing={text!r} is not understood at {part!r}. Use '' (all {steps} "
            "steps), a number of steps such as '25', one number per section such as "
            "'90,60,60,20,20', or 'ddimN' such as 'ddim25'."
        ) from None


def _ddim_timesteps(steps: int, text: str) -> np.ndarray:
    try:
        count = int(text[len("ddim") :])
    except ValueError:
        raise ValueError(
            f"timestep_respacing={text!r} is not understood: 'ddim' is followed by a number of "
            "steps, such as 'ddim25'."
        ) from None
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return np.arange(0, steps, stride, dtype=np.int64)
    valid = ddim_step_counts(steps)
    below = [n for n in valid if n < count][-1:]
    above = [n for n in valid if n > count][:1]
    nearest = " or ".join(f"'ddim{n}'" for n in below + above) or "none"
    raise ValueError(
        f"timestep_respacing={text!r}: no integer stride gives exactly {count} of {steps} steps. "
        f"Nearest valid: {nearest}; '{min(max(count, 1), steps)}' (without 'ddim') is also valid."
    )


class Diffusion:
    """A Gaussian diffusion process and what its network predicts; float64 NumPy tables, no torch.

    Arguments are guided-diffusion's flags: ``steps`` of the original process, ``noise_schedule``
    ("linear" or "cosine"), ``timestep_respacing`` (see :func:`respaced_timesteps`), ``learn_sigma``
    (the network has C more output channels, which interpolate log variances), ``sigma_small`` (the
    smaller fixed variance; ignored with ``learn_sigma``), ``predict_xstart`` / ``predict_previous``
    (what the first C channels are; default the noise eps), ``rescale_timesteps`` (the network sees
    t*1000/steps), ``rescale_learned_sigmas`` / ``use_kl`` (training loss only).

    All tables are float64 of length ``num_timesteps`` and belong to the respaced process, except
    ``original_alphas_cumprod`` [steps].
    """

    def __init__(
        self,
        steps: int = 1000,
        noise_schedule: str = "linear",
        timestep_respacing: str | int = "",
        learn_sigma: bool = True,
        sigma_small: bool = False,
        predict_xstart: bool = False,
        predict_previous: bool = False,
        rescale_timesteps: bool = False,
        rescale_learned_sigmas: bool = False,
        use_kl: bool = False,
    ):
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
            raise TypeError(f"steps must be an int, not {type(steps).__name__} {steps!r}.")
        if steps < 1:
            raise ValueError(f"steps={steps} is not allowed; use at least 1 (usually 1000).")
        if predict_xstart and predict_previous:
            raise ValueError(
                "predict_xstart and predict_previous are both True; a network has one target. "
                "Set one of them, or neither for the noise (eps)."
            )
        self.steps = int(steps)
        self.noise_schedule = noise_schedule
        self.timestep_respacing = str(timestep_respacing).strip()
        self.learn_sigma = bool(learn_sigma)
        self.sigma_small = bool(sigma_small)
        self.predict_xstart = bool(predict_xstart)
        self.predict_previous = bool(predict_previous)
        self.rescale_timesteps = bool(rescale_timesteps)
        self.rescale_learned_sigmas = bool(rescale_learned_sigmas)
        self.use_kl = bool(use_kl)

        original = betas_of(noise_schedule, self.steps)
        self.original_alphas_cumprod = np.cumprod(1.0 - original)
        self.timestep_map = respaced_timesteps(self.steps, timestep_respacing)
        self.num_timesteps = len(self.timestep_map)
        self._make_tables()

    def _make_tables(self) -> None:
        kept = self.original_alphas_cumprod[self.timestep_map]
        self.betas = 1.0 - kept / np.append(1.0, kept[:-1])
        alphas = 1.0 - self.betas
        abar = self.alphas_cumprod = np.cumprod(alphas)
        prev = self.alphas_cumprod_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)

        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - abar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - abar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / abar - 1.0)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 6-7. Its variance is 0 at i=0, so the logarithm there is
        # that of i=1 (a one-step process has only beta_0).
        self.posterior_mean_coef1 = self.betas * np.sqrt(prev) / (1.0 - abar)
        self.posterior_mean_coef2 = (1.0 - prev) * np.sqrt(alphas) / (1.0 - abar)
        self.posterior_variance = self.betas * (1.0 - prev) / (1.0 - abar)
        first = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.log_betas = np.log(self.betas)
        self.fixed_large_log_variance = np.log(np.append(first, self.betas[1:]))

        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    @property
    def model_mean_type(self) -> str:
        """What the first C output channels are: "eps", "xstart" or "previous_x"."""
        if self.predict_xstart:
            return "xstart"
        return "previous_x" if self.predict_previous else "eps"

    @property
    def model_var_type(self) -> str:
        """ "learned_range", "fixed_large" or "fixed_small"."""
        if self.learn_sigma:
            return "learned_range"
        return "fixed_small" if self.sigma_small else "fixed_large"

    @property
    def loss_type(self) -> str:
        """ "mse", "rescaled_mse" or "rescaled_kl", as the flags choose it."""
        if self.use_kl:
            return "rescaled_kl"
        return "rescaled_mse" if self.rescale_learned_sigmas else "mse"

    def scaled_timestep(self, original_t: float) -> float:
        """What the network is fed for a (possibly fractional) timestep of the original process."""
        return float(original_t) * (1000.0 / self.steps if self.rescale_timesteps else 1.0)

    def model_timestep(self, i: int) -> float:
        """What the network is fed at position ``i`` of this process."""
        if not 0 <= i < self.num_timesteps:
            raise ValueError(f"i={i} is not a step of this process, 0 to {self.num_timesteps - 1}.")
        return self.scaled_timestep(self.timestep_map[i])

    def model_timesteps(self, t):
        """:meth:`model_timestep` for an int64 array or tensor [N] of positions, as float32."""
        table = self.timestep_map * (1000.0 / self.steps if self.rescale_timesteps else 1.0)
        if isinstance(t, np.ndarray):
            return table[t].astype(np.float32)
        import torch

        return torch.from_numpy(np.asarray(table, dtype=np.float64)).to(t.device)[t].float()

    def respaced(self, timestep_respacing: str | int) -> Diffusion:
        """The same original process with other kept steps (not a respacing of this respacing)."""
        return Diffusion(**{**self.to_config(), "timestep_respacing": timestep_respacing})

    def to_config(self) -> dict:
        """The constructor's arguments, as plain values."""
        return {name: getattr(self, name) for name in _FLAGS}

    @classmethod
    def from_config(cls, config: dict) -> Diffusion:
        """The inverse of :meth:`to_config`; missing flags take their defaults."""
        for name in config:
            if name not in _FLAGS:
                near = difflib.get_close_matches(str(name), _FLAGS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"Unknown diffusion flag {name!r}; known: {', '.join(_FLAGS)}.{hint}"
                )
        return cls(**config)

    def __repr__(self) -> str:
        return f"Diffusion({', '.join(f'{k}={v!r}' for k, v in self.to_config().items())})"


_FLAGS = (
    "steps",
    "noise_schedule",
    "timestep_respacing",
    "learn_sigma",
    "sigma_small",
    "predict_xstart",
    "predict_previous",
    "rescale_timesteps",
    "rescale_learned_sigmas",
    "use_kl",
)
