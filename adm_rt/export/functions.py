"""The standard-op bodies of the nodes of domain "adm_rt", as ONNX model-local functions.

For any runtime: every dimension but N is static after shape inference, and there is no op that a
runtime may lack or take apart (Attention-23 is one). Arithmetic is that of ``adm_rt.ops``: moments
and softmax in float32 whatever the type of x. GroupNormalization is not used, because its
definition takes the variance as E[x^2] - E[x]^2, which cancels where a group's mean is large.

Bodies of the norm work on NCHW: their Transposes and the ones around the node cancel.
"""

from __future__ import annotations

from adm_rt.export.nodes import DOMAIN, NODES, OPSET, Node


def function(name: str):
    """The ``onnx.FunctionProto`` of a node of ``NODES``."""
    import onnx

    proto = onnx.parser.parse_function(function_text(name))
    proto.doc_string = NODES[name].meaning
    return proto


def function_text(name: str) -> str:
    """The same in ONNX's text form."""
    node = NODES[name]
    bodies = {"ada_group_norm": _ada_group_norm, "qkv_attention": _qkv_attention}
    attributes = ", ".join([*node.attributes, "plugin_namespace", "plugin_version"])
    lines = "\n".join(line.strip() for line in bodies[node.op](node).splitlines() if line.strip())
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{name} <{attributes}> ({', '.join(node.inputs)}) => ({', '.join(node.outputs)})\n"
        f"{{\n{lines}\n}}"
    )


def _vectors(**values):
    """Lines that make int64 vectors."""
    lines = [f"{k} = Constant <value_ints: ints = {list(v)}> ()" for k, v in values.items()]
    return "\n".join(lines) + "\n"


# ---- ada_group_norm ----


def _ada_group_norm(node: Node) -> str:
    bodies = {"forward": _norm, "forward_with_moments": _norm_with_moments}
    return _NORM_START + bodies.get(node.options["direction"], _norm_backward)(node)


# xg [N, G, values of a group] float32
_NORM_START = (
    _vectors(zero=[0], minus_one=[-1], channel=[1, -1, 1, 1], image_channel=[0, -1, 1, 1])
    + """
    one = Constant <value_float: float = 1.0> ()
    group_count = Constant <value_int: int = @groups> ()
    group_counts = Reshape (group_count, minus_one)
    by_group = Concat <axis: int = 0> (zero, group_counts, minus_one)
    x_nchw = Transpose <perm: ints = [0, 3, 1, 2]> (x)
    xf = Cast <to: int = 1> (x_nchw)
    shape = Shape (xf)
    xg = Reshape (xf, by_group)
    """
)


def _affine(node, offset=True):
    """a (and b), [1 or N, C, 1, 1]: v = a * xhat + b."""
    names = (("weight", "a"), ("bias", "b"))[: 2 if offset else 1]
    if not node.options["modulated"]:
        return "".join(f"{name} = Reshape ({of}, channel)\n" for of, name in names)
    lines = "".join(f"u_{name} = Reshape ({of}, channel)\n" for of, name in names)
    return (
        lines
        + """
        scale, shift = Split <axis: int = 1, num_outputs: int = 2> (scale_shift)
        scale_4d = Reshape (scale, image_channel)
        shift_4d = Reshape (shift, image_channel)
        factor = Add (scale_4d, one)
        a = Mul (u_a, factor)
        scaled_b = Mul (u_b, factor)
        b = Add (scaled_b, shift_4d)
        """
    )


def _activated(node):
    """y like x from xhat [N, C, H, W] float32."""
    lines = """
        a_xhat = Mul (xhat, a)
        v = Add (a_xhat, b)
    """
    value = "v"
    if node.options["silu"]:
        lines += """
        sigmoid = Sigmoid (v)
        silu = Mul (v, sigmoid)
        """
        value = "silu"
    return lines + _like_x(value, "y")


def _like_x(value, name):
    return f"""
        {value}_typed = CastLike ({value}, x)
        {name} = Transpose <perm: ints = [0, 2, 3, 1]> ({value}_typed)
    """


def _norm(node):
    # InstanceNormalization over [N, G, .]: the one normalisation that every runtime has whole.
    lines = """
        ones = ConstantOfShape <value: tensor = float[1] {1.0}> (group_counts)
        zeros = ConstantOfShape <value: tensor = float[1] {0.0}> (group_counts)
        xhat_g = InstanceNormalization <epsilon: float = @eps> (xg, ones, zeros)
        xhat = Reshape (xhat_g, shape)
    """
    return lines + _affine(node) + _activated(node)


def _norm_with_moments(node):
    lines = (
        _vectors(last=[2], flat=[0, -1])
        + """
        eps = Constant <value_float: float = @eps> ()
        mean_g = ReduceMean <keepdims: int = 1> (xg, last)
        centred = Sub (xg, mean_g)
        square = Mul (centred, centred)
        variance = ReduceMean <keepdims: int = 1> (square, last)
        raised = Add (variance, eps)
        deviation = Sqrt (raised)
        rstd_g = Reciprocal (deviation)
        mean = Reshape (mean_g, flat)
        rstd = Reshape (rstd_g, flat)
        xhat_g = Mul (centred, rstd_g)
        xhat = Reshape (xhat_g, shape)
        """
    )
    return lines + _affine(node) + _activated(node)


def _norm_backward(node):
    """dx = rstd * (a dv - mean(a dv) - xhat mean(a dv xhat)), the means over each group."""
    silu = node.options["silu"]
    lines = (
        _vectors(last=[2], of_group=[0, -1, 1])
        + """
        mean_g = Reshape (mean, of_group)
        rstd_g = Reshape (rstd, of_group)
        centred = Sub (xg, mean_g)
        xhat_g = Mul (centred, rstd_g)
        grad_nchw = Transpose <perm: ints = [0, 3, 1, 2]> (grad)
        dy = Cast <to: int = 1> (grad_nchw)
        """
        + _affine(node, offset=silu)
    )
    if silu:
        # silu'(v) = s + v s (1 - s)
        lines += """
        xhat = Reshape (xhat_g, shape)
        a_xhat = Mul (xhat, a)
        v = Add (a_xhat, b)
        sigmoid = Sigmoid (v)
        rest = Sub (one, sigmoid)
        v_rest = Mul (v, rest)
        bracket = Add (one, v_rest)
        slope = Mul (sigmoid, bracket)
        dv = Mul (dy, slope)
        """
    lines += f"""
        adv = Mul ({"dv" if silu else "dy"}, a)
        adv_g = Reshape (adv, by_group)
        adv_mean = ReduceMean <keepdims: int = 1> (adv_g, last)
        adv_xhat = Mul (adv_g, xhat_g)
        projection = ReduceMean <keepdims: int = 1> (adv_xhat, last)
        along_xhat = Mul (xhat_g, projection)
        centred_adv = Sub (adv_g, adv_mean)
        bracketed = Sub (centred_adv, along_xhat)
        dx_g = Mul (bracketed, rstd_g)
        dx_f = Reshape (dx_g, shape)
    """
    return lines + _like_x("dx_f", "dx")


# ---- qkv_attention ----


def _qkv_attention(node: Node) -> str:
    bodies = {"forward": _softmax, "forward_with_stats": _softmax_with_stats}
    direction, order = node.options["direction"], node.options["order"]
    start = _heads(order) + bodies.get(direction, _softmax)(node)
    return start + (_attention_backward(order) if direction == "backward" else _ATTENDED)


def _heads(order):
    """q [N, H, Q, d], k, v [N, H, T, d] and the logits [N, H, Q, T] in float32."""
    split, first = ("0, 0, H, 3, d", [3, 0, 2, 1, 4]), ("0, 0, 3, H, d", [2, 0, 3, 1, 4])
    dims, perm = {"legacy": split, "new": first}[order]
    names = {"0": "zero", "3": "three", "H": "heads", "d": "minus_one"}
    dims = ", ".join(names[dim] for dim in dims.split(", "))
    return (
        _vectors(zero=[0], one=[1], three=[3], minus_one=[-1], axis_2=[2], axis_3=[3]) + f"""
        head_count = Constant <value_int: int = @num_heads> ()
        heads = Reshape (head_count, minus_one)
        query_count = Constant <value_int: int = @num_queries> ()
        queries = Reshape (query_count, minus_one)
        split_shape = Concat <axis: int = 0> ({dims})
        qkv_5d = Reshape (qkv, split_shape)
        qkv_by_kind = Transpose <perm: ints = {perm}> (qkv_5d)
        q_1, k_1, v_1 = Split <axis: int = 0, num_outputs: int = 3> (qkv_by_kind)
        q_all = Squeeze (q_1, zero)
        k = Squeeze (k_1, zero)
        v = Squeeze (v_1, zero)
        q = Slice (q_all, zero, queries, axis_2)
        """
        # d^-1/4 on q and k each: in float16 the product of unscaled ones could overflow
        """
        head_dim_int = Constant <value_int: int = @head_dim> ()
        head_dim_float = Cast <to: int = 1> (head_dim_int)
        minus_quarter = Constant <value_float: float = -0.25> ()
        root_scale = Pow (head_dim_float, minus_quarter)
        root_scale_typed = CastLike (root_scale, qkv)
        q_scaled = Mul (q, root_scale_typed)
        k_scaled = Mul (k, root_scale_typed)
        k_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (k_scaled)
        logits_typed = MatMul (q_scaled, k_transposed)
        logits = Cast <to: int = 1> (logits_typed)
        """
    )


def _softmax(node):
    return """
        p = Softmax <axis: int = -1> (logits)
        p_typed = CastLike (p, qkv)
    """


def _softmax_with_stats(node):
    return """
        log2_e = Constant <value_float: float = 1.4426950408889634> ()
        maximum = ReduceMax <keepdims: int = 1> (logits, axis_3)
        shifted = Sub (logits, maximum)
        exponential = Exp (shifted)
        sum = ReduceSum <keepdims: int = 1> (exponential, axis_3)
        p = Div (exponential, sum)
        p_typed = CastLike (p, qkv)
        maximum_in_log2 = Mul (maximum, log2_e)
        stats_last = Concat <axis: int = 3> (maximum_in_log2, sum)
        stats = Transpose <perm: ints = [0, 1, 3, 2]> (stats_last)
    """


_ATTENDED = """
        out_shape = Concat <axis: int = 0> (zero, zero, minus_one)
        out_heads = MatMul (p_typed, v)
        out_4d = Transpose <perm: ints = [0, 2, 1, 3]> (out_heads)
        out = Reshape (out_4d, out_shape)
"""


def _attention_backward(order):
    """dv = P^T g, dP = g v^T, dS = P (dP - rowsum(P dP)) / sqrt(d), dq = dS k, dk = dS^T q.

    P is made again from qkv: out and stats are for kernels that never hold P.
    """
    kind_axis, perm = {"legacy": (3, [0, 2, 1, 3, 4]), "new": (1, [0, 3, 1, 2, 4])}[order]
    return (
        _vectors(kind_axis=[kind_axis], six_zeros=[0] * 6)
        + f"""
        grad_shape = Concat <axis: int = 0> (zero, zero, heads, minus_one)
        grad_4d = Reshape (grad, grad_shape)
        g = Transpose <perm: ints = [0, 2, 1, 3]> (grad_4d)
        p_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (p_typed)
        dv = MatMul (p_transposed, g)
        v_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (v)
        dp_typed = MatMul (g, v_transposed)
        dp = Cast <to: int = 1> (dp_typed)
        p_dp = Mul (p, dp)
        delta = ReduceSum <keepdims: int = 1> (p_dp, axis_3)
        dp_centred = Sub (dp, delta)
        ds_unscaled = Mul (p, dp_centred)
        scale = Mul (root_scale, root_scale)
        ds_wide = Mul (ds_unscaled, scale)
        ds = CastLike (ds_wide, qkv)
        dq_asked = MatMul (ds, k)
        ds_transposed = Transpose <perm: ints = [0, 1, 3, 2]> (ds)
        dk = MatMul (ds_transposed, q)
        length = Shape <start: int = 1, end: int = 2> (qkv)
        silent = Sub (length, queries)
        pads = Concat <axis: int = 0> (six_zeros, silent, zero)
        dq = Pad (dq_asked, pads)
        dq_5d = Unsqueeze (dq, kind_axis)
        dk_5d = Unsqueeze (dk, kind_axis)
        dv_5d = Unsqueeze (dv, kind_axis)
        by_head = Concat <axis: int = {kind_axis}> (dq_5d, dk_5d, dv_5d)
        by_token = Transpose <perm: ints = {perm}> (by_head)
        dqkv_shape = Concat <axis: int = 0> (zero, zero, minus_one)
        dqkv = Reshape (by_token, dqkv_shape)
        """
    )
