"""Starting from trained weights, with another number of classes if need be."""

from __future__ import annotations

import torch

from adm_rt.errors import CheckpointError
from adm_rt.locate import locate
from adm_rt.models import build
from adm_rt.models.checkpoint import load_checkpoint


def read_initial(source, what, preset=None, **flags):
    """The network of kind ``what`` in ``source``: a zoo name, model folder or released ``.pt``.

    preset, flags: as in ``load_checkpoint``. Raises ValueError or CheckpointError: another kind,
    or flags that disagree with the weights.
    """
    network = load_checkpoint(locate(source, "init", kind=what), preset, **flags)
    if network.cfg.kind != what:
        raise ValueError(
            f"init={str(source)!r} is of kind {network.cfg.kind!r}; a {what} model is needed."
        )
    return network


def with_classes(network, class_cond, num_classes, null_class=False):
    """``network`` made ready to train on other classes, and what of it is new: (module, lines).

    For another number of classes ``label_emb`` starts with every row at the mean of the old rows
    (at zero, if there were none), so that the network first does what it did for an average class;
    a null class that is added to the same classes starts there too, and theirs are kept. A
    classifier's last layer starts at random, from torch's generator. All else is kept. A null
    class that is there stays. num_classes is not looked at when there are no classes.

    Raises ValueError for a class-conditional network and class_cond=False.
    """
    old = network.cfg
    if old.class_cond and not class_cond:
        raise ValueError(
            f"init is class-conditional ({old.num_classes} classes), and this run has no classes "
            "(class_cond=False, or data without labels). Give labelled data, or start from an "
            "unconditional model."
        )
    changes = {
        "class_cond": class_cond,
        "null_class": class_cond and (null_class or old.null_class),
    }
    if class_cond or old.kind == "classifier":
        changes["num_classes"] = num_classes
    config = old.replace(**changes)
    if config == old:
        return network.train(), []
    new = build(config)
    state, remarks, fresh = network.state_dict(), [], new.state_dict()
    for name, value in fresh.items():
        if name == "label_emb.weight":
            fresh[name] = _embedding(state.get(name), value)
            if old.class_cond and old.num_classes == num_classes:
                fresh[name][:num_classes] = state[name][:num_classes]
                remarks.append(f"label_emb has a new row, the null class ({num_classes})")
            else:
                rows = f"it had {len(state[name])}" if name in state else "it had none"
                remarks.append(f"label_emb is new: {len(value)} rows ({rows})")
        elif name in state and state[name].shape == value.shape:
            fresh[name] = state[name]
        elif old.kind == "classifier" and name.startswith("out.") and len(value) == num_classes:
            if name.endswith(".weight"):
                remarks.append(
                    f"the last layer is new: {num_classes} classes (it had {old.num_classes})"
                )
        else:
            raise CheckpointError(
                f"init: weight {name!r} does not fit {list(value.shape)}; only label_emb and a "
                "classifier's last layer can be made anew."
            )
    new.load_state_dict(fresh)
    return new.train(), remarks


def _embedding(old, like):
    rows = torch.zeros_like(like)
    return rows if old is None else rows + old.mean(0)
