"""What a sampler does in each of its steps, found out by running it on place-holders.

Which networks a step asks and which earlier results its update takes never depends on values. So
one trial without any data tells it for the whole run, and the steps that do the same, up to the
numbers in their rows of coefficients, can be replayed from one recording.
"""

from __future__ import annotations

from typing import NamedTuple

from adm_rt.diffusion.guidance import FRESH, REUSE, SKIP
from adm_rt.ops import StepCoefficients


class Unplannable(Exception):
    """The sampler does something that is not of this form; the message says what."""


class Ref(NamedTuple):
    """A value of the run: "x", "out", "uncond", "gradient", "x_next", "x0" or "state".

    age: how many steps ago it was made. prediction: only the first channels of it.
    """

    name: str
    age: int = 0
    prediction: bool = False


class Update(NamedTuple):
    """One ``guided_mean_update`` of a step without its numbers; options as there.

    output: where the model's output comes from, the network or the update before it in the step.
    """

    output: Ref
    gradient: bool
    uncond: bool
    history: tuple[Ref, ...]
    noise: bool
    state: bool
    learned_variance: bool
    clip: str
    quantile: float


class StepKind(NamedTuple):
    """gradient: SKIP, FRESH (ask the classifier) or REUSE; uncond: ask without a class, too."""

    gradient: str
    uncond: bool
    updates: tuple[Update, ...]


class StepPlan(NamedTuple):
    """A run. By step: kinds; rows, one per update; timesteps of the original process;
    model_timesteps, as the networks are given them. null_label: the class of "uncond", or None."""

    kinds: list[StepKind]
    rows: list[tuple[StepCoefficients, ...]]
    timesteps: list[float]
    model_timesteps: list[float]
    null_label: int | None

    def oldest(self, name):
        """The greatest age at which a value of that name is asked for."""
        refs = [ref for kind in self.kinds for update in kind.updates for ref in update.history]
        return max((ref.age for ref in refs if ref.name == name), default=0)


def plan_steps(
    sampler, shape, diffusion, guidance_scale, *, out_channels, labelled, low_shape=None, **options
):
    """The ``StepPlan`` of a run of ``sampler`` on images of ``shape`` [N, C, H, W] with seeds.

    out_channels: of the network's output; labelled: whether there are labels; low_shape: of the
    small images; options: the sampler's own, without noise and callback. Raises what the sampler
    raises for them, and Unplannable.
    """
    trial = _Trial(shape, out_channels)
    low_res = None if low_shape is None else _Value(trial, "low_res", 0, low_shape)
    end = sampler(
        trial,
        trial.x,
        diffusion,
        trial.y if labelled else None,
        guidance_scale,
        noise=trial.seeds,
        low_res=low_res,
        callback=trial.end_of_step,
        **options,
    )
    if end is not trial.x or not trial.kinds:
        raise Unplannable("the sampler's result is not the x of its last step")
    kinds = _unified(trial.kinds)
    null = None if trial.null is None else trial.null.label
    return StepPlan(kinds, trial.rows, trial.timesteps, trial.model_timesteps, null)


class _Value:
    """A place-holder for an array."""

    def __init__(self, trial, name, step, shape, dtype="float32", prediction=False):
        self.trial, self.name, self.step, self.prediction = trial, name, step, prediction
        self.shape, self.dtype = tuple(shape), dtype
        self.label = None  # of labels that are all the same

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        channels = self.trial.x.shape[1]
        if index != (slice(None), slice(None, channels)):
            raise Unplannable(f"{self.name}[{index}] is asked for")
        shape = (self.shape[0], channels, *self.shape[2:])
        return _Value(self.trial, self.name, self.step, shape, self.dtype, prediction=True)

    def copy(self):
        return self.trial.null_labels(self)

    def __setitem__(self, index, label):
        if index is not Ellipsis:
            raise Unplannable(f"{self.name}[{index}] is set")
        self.label = label

    @property
    def ref(self):
        return Ref(self.name, self.trial.step - self.step, self.prediction)


class _Trial:
    """The engine of a trial: writes down what it is asked for, and answers with place-holders."""

    def __init__(self, shape, out_channels):
        self.step, self._out_channels = 0, out_channels
        self.x = _Value(self, "x", 0, shape)
        self.y = _Value(self, "y", 0, shape[:1], "int64")
        self.seeds = _Value(self, "seeds", 0, shape[:1], "int64")
        self.null = None
        self._gradient = None
        self.kinds, self.rows, self.timesteps, self.model_timesteps = [], [], [], []
        self._begin()

    def null_labels(self, labels):
        self.null = _Value(self, labels.name, 0, labels.shape, labels.dtype)
        return self.null

    # ---- what GuidedRun calls ----

    def denoise(self, x, t, y=None, low_res=None):
        self._same_place(x, t)
        name = "uncond" if self.null is not None and y is self.null else "out"
        self._asked.add(name)
        n, _, *size = x.shape
        return _Value(self, name, self.step, (n, self._out_channels, *size))

    def classifier_gradient(self, x, t, y):
        self._same_place(x, t)
        self._asked.add("gradient")
        self._gradient = _Value(self, "gradient", self.step, x.shape)
        return self._gradient

    def guided_mean_update(
        self, x, output, row, *, gradient=None, uncond_output=None, history=(), noise=None,
        seeds=None, step=0, learned_variance=False, clip="static", quantile=0.995,
    ):  # fmt: skip
        """See the op."""
        if x is not self.x or noise is not None or (seeds is not None and step != self.step):
            raise Unplannable("an update of another x, or with noise that is no seed's")
        if gradient is not None and gradient is not self._gradient:
            raise Unplannable("an update with an earlier gradient than the latest")
        self._reads = self._reads or gradient is not None
        self._updates.append(
            Update(
                output=output.ref,
                gradient=gradient is not None,
                uncond=uncond_output is not None,
                history=tuple(value.ref for value in history),
                noise=seeds is not None,
                state=row.has_state,
                learned_variance=learned_variance,
                clip=clip,
                quantile=quantile,
            )
        )
        self._rows.append(row)
        names = ("x_next", "x0", *(["state"] if row.has_state else []))
        made = [_Value(self, name, self.step, x.shape) for name in names]
        self._next = made[0]
        return (*made, *[None] * (3 - len(made)))

    def end_of_step(self, step, total, t, x0):
        """The sampler's callback."""
        if step != self.step or self._next is None or "out" not in self._asked:
            raise Unplannable(f"step {step} has no update")
        gradient = FRESH if "gradient" in self._asked else REUSE if self._reads else SKIP
        self.kinds.append(StepKind(gradient, "uncond" in self._asked, tuple(self._updates)))
        self.rows.append(tuple(self._rows))
        self.timesteps.append(float(t))
        self.model_timesteps.append(self._t)
        self.x = self._next
        self.step += 1
        self._begin()

    def _begin(self):
        self._asked, self._updates, self._rows = set(), [], []
        self._reads, self._next, self._t = False, None, None

    def _same_place(self, x, t):
        if x is not self.x or self._t not in (None, float(t)):
            raise Unplannable("the networks are asked at several places in one step")
        self._t = float(t)


def _unified(kinds):
    """The same with as few different kinds as possible.

    Noise, a state or an earlier value that only some steps use has the coefficient zero in the
    others' rows, where it does no harm.
    """
    groups = {}
    for kind in kinds:
        groups.setdefault(_shape_of(kind), []).append(kind)
    wide = {shape: _widest(members) for shape, members in groups.items()}
    return [wide[_shape_of(kind)] for kind in kinds]


def _shape_of(kind):
    """What cannot be evened out."""
    updates = [
        update._replace(noise=False, state=False, history=_own(update)) for update in kind.updates
    ]
    return kind._replace(updates=tuple(updates))


def _own(update):
    """The part of the history that was made in the same step."""
    return tuple(ref for ref in update.history if ref.age == 0)


def _widest(kinds):
    merged = []
    for updates in zip(*(kind.updates for kind in kinds), strict=True):
        longest = max((update.history for update in updates), key=len)
        if any(update.history != longest[: len(update.history)] for update in updates):
            raise Unplannable("steps that take different values from earlier ones")
        merged.append(
            updates[0]._replace(
                history=longest,
                noise=any(update.noise for update in updates),
                state=any(update.state for update in updates),
            )
        )
    return kinds[0]._replace(updates=tuple(merged))
