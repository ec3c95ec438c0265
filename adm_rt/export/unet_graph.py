"""The graph of a UNet or SuperResUNet."""

from __future__ import annotations

import dataclasses

from adm_rt.export.layers import Image, NetworkGraph
from adm_rt.models.structure import decoder_blocks


def unet_graph(cfg, dtype="float32") -> NetworkGraph:
    """x [N, 3, S, S], t [N], y [N] with classes, low_res for an upsampler -> output (float32).

    Equals ``models.UNet`` / ``SuperResUNet``; the last convolution is in float32 in every dtype.
    """
    graph = NetworkGraph(cfg, dtype)
    graph.embed("t", "y" if cfg.class_cond else None)
    blocks = graph.encoder(graph.stem("x", "low_res" if cfg.kind == "upsampler" else None))
    h = blocks.pop()[-1].y  # the middle block's
    for layers in decoder_blocks(cfg):
        skip = blocks.pop()[-1].y
        with graph.scope(layers[0].name):
            joined = graph.op("Concat", h.name, skip.name, axis=1)
        h = Image(joined, h.channels + skip.channels, h.height, h.width)
        h = graph.chain(layers, h)[-1].y
    h, _ = graph.norm(h, "out.0")
    with graph.scope("out.2"):
        h = dataclasses.replace(h, name=graph.cast(h.name, "float32"))
    graph.conv(h, "out.2", wide=True)
    graph.finish("output")
    return graph
