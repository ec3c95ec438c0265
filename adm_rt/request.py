"""Arguments of sampling, checked before any work: what the user typed -> what will run.

Every function raises TypeError or ValueError naming the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
import numbers
import operator
import warnings

import numpy as np

from adm_rt.diffusion import Diffusion
from adm_rt.models.config import nearest
from adm_rt.ops.philox import image_seeds, philox_randint

THRESHOLDING = ("static", "dynamic", "none")
DEFAULT_IMAGES = 16
MAX_IMAGES = 2**31  # bit 31 of the image index marks the upsampling stage, see stage_seeds
_STAGE_BIT = 1 << 31


def check_count(name, value, low=1, high=None):
    """``value`` as an int in [low, high]."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer") from None
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer")
    if count < low or (high is not None and count > high):
        allowed = f"{low} or more" if high is None else f"{low}..{high}"
        raise ValueError(f"{name}={count} is out of range; allowed: {allowed}")
    return count


def check_number(name, value, low=None, high=None, way_out=""):
    """``value`` as a finite float in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r} must be a finite number{way_out}")
    if (low is not None and number < low) or (high is not None and number > high):
        allowed = f"{low} or more" if high is None else f"{low}..{high}"
        raise ValueError(f"{name}={number:g} is out of range; allowed: {allowed}{way_out}")
    return number


def check_choice(name, value, allowed):
    """``value`` if it is one of ``allowed``."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(
            f"{name}={value!r} is unknown; allowed: {choices}.{nearest(value, allowed)}"
        )
    return value


def check_sampler(value, name="sampler"):
    """A key of ``SAMPLERS`` that makes images."""
    from adm_rt.samplers import SAMPLERS

    if isinstance(value, str) and value in SAMPLERS and SAMPLERS[value].encodes:
        raise ValueError(
            f"{name}={value!r} turns images into noise, so it cannot make images; call "
            f"adm_rt.samplers.SAMPLERS[{value!r}] on images of yours"
        )
    return check_choice(name, value, tuple(n for n in SAMPLERS if not SAMPLERS[n].encodes))


def sampler_function(name, argument="sampler"):
    """The sampler's function; errors as ``check_sampler``."""
    from adm_rt.samplers import SAMPLERS

    return SAMPLERS[check_sampler(name, argument)]


def respaced_diffusion(cfg, steps, name="steps"):
    """The model's ``Diffusion`` with ``steps``: an int, or a respacing string.

    An int N is the published "N" for every sampler; "ddim25" and section lists pass through, ""
    is every step of the process.
    """
    if not isinstance(steps, str):
        steps = str(check_count(name, steps, 1, cfg.diffusion_steps))
    try:
        return Diffusion(**{**cfg.diffusion_config(), "timestep_respacing": steps})
    except ValueError as error:
        raise ValueError(f"{name}={steps!r}: {error}") from None


def warn_of_first_guided_step(diffusion, steps):
    """Warn where guided DDIM begins at so low a signal that its images are destroyed.

    Guidance enters x0 times (1 - abar) / sqrt(abar) (Dhariwal & Nichol 2021, algorithm 2): 158 at
    t = 999 of the linear schedule, 20,000 of the cosine one.
    """
    abar = float(diffusion.alphas_cumprod[-1])
    factor = (1 - abar) / abar**0.5
    if factor > 1000:
        warnings.warn(
            f"steps={steps!r}: guided ddim begins at timestep {diffusion.timestep_map[-1]}, where "
            f"guidance is multiplied by {factor:,.0f} in x0; the images will be noise. Use "
            f"steps='ddim{diffusion.num_timesteps}', another sampler, or a guidance_interval.",
            stacklevel=3,
        )


def warn_of_unused_sections(sampler, diffusion, name="steps"):
    """Warn where a list of sections is given to a sampler (a ``Sampler``) with its own grid."""
    text = diffusion.timestep_respacing
    if sampler.uses_ode_grid and "," in text:
        warnings.warn(
            f"{name}={text!r}: {sampler.name!r} spaces its {diffusion.num_timesteps} steps evenly "
            "between the first and the last kept timestep, whatever the sections are; sampler "
            "'ddpm' or 'ddim' follows them.",
            stacklevel=3,
        )


def check_interval(interval, diffusion_steps):
    """(low, high) in timesteps of the original process, or None."""
    if interval is None:
        return None
    try:
        if isinstance(interval, str):
            raise ValueError
        low, high = interval
    except (TypeError, ValueError):
        raise TypeError(
            f"guidance_interval={interval!r} must be a pair (low, high) of timesteps, 'auto' (the "
            "model's own) or None (all)"
        ) from None
    low = check_number("guidance_interval low", low, 0, diffusion_steps)
    high = check_number("guidance_interval high", high, 0, diffusion_steps)
    if low > high:
        raise ValueError(f"guidance_interval=({low:g}, {high:g}) is empty; give (low, high)")
    return low, high


def count_images(num_images, classes, seeds, classes_name="classes"):
    """How many images: ``num_images``, else the length of ``seeds`` or ``classes``, else 16."""
    lists = {"seeds": seeds, "classes": classes}
    lengths = {name: len(v) for name, v in lists.items() if is_list(v)}
    for name, length in lengths.items():
        if not length:
            name = classes_name if name == "classes" else name
            raise ValueError(f"{name}=[] is empty; give at least one, or leave it out")
    if num_images is None:
        num_images = lengths.get("seeds", lengths.get("classes", DEFAULT_IMAGES))
    count = check_count("num_images", num_images, 1, MAX_IMAGES)
    if lengths.get("seeds", count) != count:
        raise ValueError(
            f"seeds holds {lengths['seeds']} seeds for num_images={count}; give one per image, or "
            "leave num_images out"
        )
    if lengths.get("classes", count) > count:
        raise ValueError(
            f"{classes_name} holds {lengths['classes']} classes for num_images={count}; a shorter "
            "list is repeated, a longer one is an error"
        )
    return count


def is_list(value):
    """True for a list, tuple or array of values; False for None, a number or a name."""
    if isinstance(value, (list, tuple, range)):
        return True
    return getattr(value, "ndim", 0) == 1 and not isinstance(value, str)


def resolve_seeds(seed, seeds, num_images):
    """int64 [num_images]: ``seeds`` as they are, or ``(seed << 32) | index``."""
    if seeds is None:
        return image_seeds(check_count("seed", seed, 0, 2**31 - 1), num_images)
    if not is_list(seeds):
        raise TypeError(f"seeds={seeds!r} must be a list with one seed per image")
    return np.array([check_count("seeds", s, 0, 2**63 - 1) for s in seeds], dtype=np.int64)


def stage_seeds(seeds):
    """Seeds of the upsampling stage: other noise than the base image's, from the same seed."""
    return np.asarray(seeds, dtype=np.int64) ^ np.int64(_STAGE_BIT)


def resolve_classes(
    classes, num_images, seeds, num_classes, class_names=None, model="the model", name="classes"
):
    """int64 labels [num_images], or None for a model that has no classes.

    classes: None (one per image, uniform, a function of the image's seed alone), an index, a
    class name, or a list of these, repeated when shorter than ``num_images``. name: what errors
    call it.
    """
    if num_classes is None:
        if classes is not None:
            raise ValueError(
                f"{name}={classes!r} was given, but {model} has no classes and there is no "
                "classifier to guide it; leave it out"
            )
        return None
    if classes is None:
        return philox_randint(seeds, num_classes)
    values = list(classes) if is_list(classes) else [classes]
    labels = [_class_index(v, num_classes, class_names, model, name) for v in values]
    return np.resize(np.array(labels, dtype=np.int64), num_images)


def _class_index(value, num_classes, class_names, model, name):
    allowed = f"0..{num_classes - 1}"
    if class_names:
        allowed += f", or a name: {_shortened(class_names)}"
    if isinstance(value, str):
        if class_names and value in class_names:
            return list(class_names).index(value)
        if not class_names:
            raise ValueError(
                f"{name}: {value!r} is a name, but {model} has no class names; allowed: {allowed}"
            )
        raise ValueError(
            f"{name}: {value!r} is not a class of {model}; allowed: {allowed}"
            + nearest(value, class_names)
        )
    try:  # an int, and whatever NumPy and torch have for one
        index = operator.index(value)
    except TypeError:
        index = None
    if index is None or isinstance(value, bool):
        raise TypeError(
            f"{name}: {value!r} is neither a class index nor a name; allowed: {allowed}"
        )
    if not 0 <= index < num_classes:
        raise ValueError(f"{name}: {index} is out of range for {model}; allowed: {allowed}")
    return index


def _shortened(names, limit=40):
    shown = ", ".join(repr(n) for n in list(names)[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def check_callable(name, value):
    """``value`` if it is None or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}={value!r} must be callable or None")
    return value


def check_images(images, size, name="images"):
    """uint8 [N, size, size, 3] with N >= 1: what an upsampler is fed."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"{name}: {images.dtype} {list(images.shape)} was given; the upsampler takes uint8 "
            f"[N, {size}, {size}, 3]"
        )
    if not len(images):
        raise ValueError(f"{name}: there are no images")
    return images
