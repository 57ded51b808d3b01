"""What an operator costs: conventions, closed forms, and how a plugin adds its own.

Conventions, each a column of its own:

* **MACs**: multiply-accumulates of the contraction operators (linear, matmul, convolution, einsum, attention, cdist, …),
  exact integers from shapes. One multiply counts as one MAC, also where nothing is added to it: an outer product written
  as einsum, as `outer` or as a matrix product with inner size 1 has the same count. Taps of a convolution that fall on
  padding count (they are computed); biases do not; a mask of attention removes nothing. One complex MAC is one MAC.
* **FLOPs**: 2 per MAC, nothing else.
* **norms**: normalisation, resampling and average pooling in fvcore's convention (layer, group, instance and training
  batch norm 4 an element, 5 with affine; batch norm in evaluation 1, 2 with affine; bilinear 4 an output element, …).
  fvcore adds this column to its total; here `macs + norms` is that total.
* **elementwise**: one operation per element of the larger of first operand and result, for pointwise and reducing
  operators.
* **elements**: comparison-class operators (sort, topk, gather, softmax, max pooling, fft, …) have no count of arithmetic
  that means anything; their calls and the elements they look at are kept apart.
* layout operators (views, concatenation, copies, padding) cost nothing in this account.

Products of three and more operands: `einsum` is counted along the path that torch takes, which is left to right unless
opt_einsum is installed; each step costs the product of the sizes of all axes that are alive in it, after axes that only
one operand of the step has are summed away.

A plugin whose operator is not known here registers its formula when it is imported:

    @formula("mylib::window_attention")
    def window_attention(call: Call) -> int:
        *batch, tokens, channels = call["query"]                    # tensors arrive as shapes
        return 2 * prod(batch) * tokens * call["window"] * channels  # everything else as it was passed
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Literal, TypeVar, get_args

Shape = tuple[int, ...]
Kind = Literal["matmul", "norm", "elementwise", "comparison", "layout"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator, without its data.

    Attributes:
        operator: qualified name, e.g. "aten::linear". An autograd function that hides its kernel from the dispatcher is
            "autograd::<class name>", and its arguments are named as those of its `forward`.
        arguments: by the name in the operator's schema, defaults filled in. A tensor is its shape (a tuple), a list of
            tensors a list of shapes, everything else is what was passed.
        outputs: shapes of the tensors that came out.
    """

    operator: str
    arguments: Mapping[str, Any]
    outputs: tuple[Shape, ...]

    def __getitem__(self, argument: str | int) -> Any:
        """An argument by name, or by position in the schema."""
        if isinstance(argument, int):
            return list(self.arguments.values())[argument]
        return self.arguments[argument]

    def first(self, *names: str) -> Any:
        """The argument under the first of `names` that the schema has (schemas name the same thing differently)."""
        for name in names:
            if name in self.arguments:
                return self.arguments[name]
        raise KeyError(f"{self.operator} has none of the arguments {names}; it has {tuple(self.arguments)}")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call costs. `compared` maps an operator name to the elements that are compared inside this call."""

    macs: int = 0
    norms: int = 0
    elementwise: int = 0
    compared: Mapping[str, int] = dataclasses.field(default_factory=dict)


Formula = Callable[[Call], int | Cost]
F = TypeVar("F", bound=Formula)

_FORMULAS: dict[str, tuple[Kind, Formula]] = {}


def formula(*operators: str, kind: Kind = "matmul", replace: bool = False) -> Callable[[F], F]:
    """Register what operators cost; the function is returned unchanged.

    Args:
        operators: qualified names, "aten::linear", "mylib::op" or "mylib::op.overload", "autograd::MyFunction".
        kind: the column an int goes to. A formula that fills several returns a `Cost`.
        replace: allow a name that has a formula already.

    Raises:
        ValueError: for a name without namespace, an unknown kind, or a name that is taken.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")

    def add(function: F) -> F:
        for name in operators:
            space, _, rest = name.partition("::")
            if not space or not rest:
                raise ValueError(f"an operator is named 'namespace::name', got {name!r}")
            taken = _FORMULAS.get(name)
            if taken and not replace and _origin(taken[1]) != _origin(function):
                raise ValueError(
                    f"{name} has a formula already, from {taken[1].__module__}; pass replace=True to put yours in its place"
                )
            _FORMULAS[name] = (kind, function)
        return function

    return add


def _origin(function: Formula) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"


def lookup(operator: str, overload: str = "") -> tuple[Kind, Formula] | None:
    """The formula of an operator, that of its overload first."""
    return _FORMULAS.get(f"{operator}.{overload}") or _FORMULAS.get(operator)


def evaluate(kind: Kind, function: Formula, call: Call) -> Cost:
    """The cost that a formula gives, checked.

    Raises:
        TypeError: if the formula does not give a non-negative int or a `Cost`: counts are exact or they are not counts.
    """
    value = function(call)
    if isinstance(value, Cost):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(
            f"the formula of {call.operator} ({_origin(function)}) must give a non-negative int or a Cost, got {value!r}"
        )
    match kind:
        case "matmul":
            return Cost(macs=value)
        case "norm":
            return Cost(norms=value)
        case "elementwise":
            return Cost(elementwise=value)
        case "comparison":
            return Cost(compared={call.operator: value})
        case _:
            return Cost()


# --- products of matrices ---------------------------------------------------------------------------------------------


@formula("aten::linear")
def linear(call: Call) -> int:
    return prod(call["input"]) * prod(call["weight"][:-1])


@formula("aten::mm", "aten::bmm", "aten::_int_mm", "aten::_scaled_mm")
def matrices(call: Call) -> int:
    return prod(call["self"]) * call["mat2"][-1]


@formula("aten::addmm", "aten::_addmm_activation")
def added_matrices(call: Call) -> int:
    return prod(call["mat1"]) * call["mat2"][-1]


@formula("aten::baddbmm", "aten::addbmm")
def added_batches(call: Call) -> int:
    return prod(call["batch1"]) * call["batch2"][-1]


@formula("aten::matmul", "aten::linalg_matmul")
def broadcast_matmul(call: Call) -> int:
    """All forms of `torch.matmul`: every element of the result is a dot product over the inner axis."""
    return prod(call.outputs[0]) * call.first("self", "input")[-1]


@formula("aten::mv", "aten::addmv")
def matrix_vector(call: Call) -> int:
    return prod(call["mat"] if "mat" in call.arguments else call["self"])


@formula("aten::dot", "aten::vdot")
def dot(call: Call) -> int:
    return prod(call["self"])


@formula("aten::linalg_vecdot")
def vector_dots(call: Call) -> int:
    """Vectors along `dim` of two tensors that broadcast: as many dots as the result has elements."""
    dim = call["dim"]
    return prod(call.outputs[0]) * max(call["x"][dim], call["y"][dim])


@formula("aten::inner")
def inner(call: Call) -> int:
    a, b = call["self"], call["other"]
    return prod(a) * prod(b[:-1]) if a and b else prod(a) * prod(b)


@formula("aten::outer", "aten::ger", "aten::addr")
def outer(call: Call) -> int:
    return prod(call.outputs[0])


@formula("aten::tensordot")
def tensordot(call: Call) -> int:
    """Free axes of both times the contracted ones; where one side of a contracted axis is 1, the other is summed first."""
    a, b = call["self"], call["other"]
    contracted = prod(min(a[i], b[j]) for i, j in zip(call["dims_self"], call["dims_other"]))
    free = [size for shape, dims in ((a, call["dims_self"]), (b, call["dims_other"])) for size in _free(shape, dims)]
    return prod(free) * contracted


def _free(shape: Shape, contracted: Sequence[int]) -> list[int]:
    taken = {dim % len(shape) for dim in contracted}
    return [size for axis, size in enumerate(shape) if axis not in taken]


@formula("aten::bilinear")
def bilinear(call: Call) -> int:
    """out[b, o] = sum_ij x[b, i] W[o, i, j] y[b, j]: first over i, then over j."""
    out, left, right = call["weight"]
    return prod(call["input1"][:-1]) * out * (left * right + right)


@formula("aten::cdist", "aten::_cdist_forward", "aten::_euclidean_dist", "aten::pdist", "aten::_pdist_forward")
def distances(call: Call) -> int:
    """One MAC for each pair of rows and each coordinate, whatever the norm and whatever kernel computes it."""
    return prod(call.outputs[0]) * call.first("x1", "self")[-1]


# --- einsum -----------------------------------------------------------------------------------------------------------


def _terms(equation: str, shapes: Sequence[Shape]) -> tuple[list[list[str]], list[str]]:
    """The axis labels of every operand and of the result, ellipses spelled out (their axes align from the right)."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if len(operands) != len(shapes):
        raise ValueError(f"einsum {equation!r} names {len(operands)} operands, got {len(shapes)}")
    hidden = [len(shape) - len(term.replace("...", "")) if "..." in term else 0 for term, shape in zip(operands, shapes)]
    width = max(hidden, default=0)

    def spell(term: str, axes: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *([f"...{i}" for i in range(width - axes, width)] if dots else []), *after]

    spelled = [spell(term, axes) for term, axes in zip(operands, hidden)]
    if arrow:
        return spelled, spell(right, width)
    seen = Counter(label for term in spelled for label in term)
    letters = sorted(label for label, times in seen.items() if times == 1 and not label.startswith("..."))
    return spelled, [f"...{i}" for i in range(width)] + letters


def einsum_macs(equation: str, shapes: Sequence[Shape], path: Sequence[int] | None = None) -> int:
    """MACs of `torch.einsum` along the path that it takes.

    Args:
        equation: as torch takes it, with or without ellipsis and arrow.
        shapes: one an operand. An axis of size 1 broadcasts.
        path: pairs of positions in the list of what is left, flattened, as opt_einsum gives; a result goes to the end of
            the list. None contracts from left to right.

    Raises:
        ValueError: if equation and shapes do not belong together.
    """
    terms, result = _terms(equation, shapes)
    sizes: dict[str, int] = dict.fromkeys(result, 1)
    for term, shape in zip(terms, shapes):
        if len(term) != len(shape):
            raise ValueError(f"einsum {equation!r}: operand {''.join(term)} has {len(term)} axes, got shape {shape}")
        for label, size in zip(term, shape):
            known = sizes.get(label, 1)
            if 1 not in (known, size) and known != size:
                raise ValueError(f"einsum {equation!r}: axis {label} is {known} and {size}")
            sizes[label] = size if known == 1 else known
    # An axis of size 1 takes no part in the count, so an operand is the set of its axes that are longer.
    left = [{label for label, size in zip(term, shape) if size != 1} for term, shape in zip(terms, shapes)]
    keep = set(result)
    pairs = [sorted(pair) for pair in zip(path[::2], path[1::2])] if path else [[0, 1]] * (len(left) - 1)
    macs = 0
    for i, j in pairs:
        if len(left) == 1:
            break
        second, first = left.pop(j), left.pop(i)
        needed = keep.union(*left)
        alone = (first ^ second) - needed  # summed before the product: additions, not MACs
        alive = (first | second) - alone
        macs += prod(sizes[label] for label in alive)
        left.insert(len(left) if path else 0, alive & needed)
    return macs


@formula("aten::einsum")
def einsum(call: Call) -> int:
    return einsum_macs(call["equation"], call["tensors"], call["path"])


# --- attention --------------------------------------------------------------------------------------------------------


def attention_cost(queries: int, keys: int, dim_key: int, dim_value: int) -> Cost:
    """Scaled dot-product attention of `queries` rows (batch, heads and tokens together), each against `keys` tokens."""
    return Cost(macs=queries * keys * (dim_key + dim_value), compared={"aten::softmax": queries * keys})


@formula(
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)
def scaled_dot_product_attention(call: Call) -> Cost:
    """Query rows times keys, once with the key and once with the value width; grouped keys serve several query heads.

    The count is that of the dense product: a causal or a given mask changes which numbers matter, not how many there are.
    """
    *_, keys, width = call["value"]
    return attention_cost(prod(call.outputs[0][:-1]), keys, call["query"][-1], width)


@formula("aten::_native_multi_head_attention")
def fused_multi_head_attention(call: Call) -> Cost:
    """The fast path of nn.MultiheadAttention: three projections in, attention, one projection out."""
    batch, tokens, dim = call["query"]
    keys = call["key"][1]
    inside = attention_cost(batch * call["num_head"] * tokens, keys, dim // call["num_head"], dim // call["num_head"])
    return dataclasses.replace(inside, macs=inside.macs + batch * dim * dim * (2 * tokens + 2 * keys))


# --- convolution and recurrence ---------------------------------------------------------------------------------------


@formula(
    "aten::conv1d",
    "aten::conv2d",
    "aten::conv3d",
    "aten::_convolution_mode",
    "aten::thnn_conv2d",
    "aten::slow_conv3d",
    "aten::_slow_conv2d_forward",
    "aten::slow_conv3d_forward",
    "aten::slow_conv_dilated2d",
    "aten::slow_conv_dilated3d",
    "aten::_conv_depthwise2d",
    "aten::conv_depthwise3d",
    "aten::mkldnn_convolution",
    "aten::cudnn_convolution",
    "aten::miopen_convolution",
)
def convolution(call: Call) -> int:
    """Every element of the result is a sum over (input channels of its group) x kernel."""
    return prod(call.outputs[0]) * prod(call["weight"][1:])


@formula(
    "aten::conv_transpose1d",
    "aten::conv_transpose2d",
    "aten::conv_transpose3d",
    "aten::slow_conv_transpose2d",
    "aten::slow_conv_transpose3d",
    "aten::cudnn_convolution_transpose",
    "aten::miopen_convolution_transpose",
)
def transposed_convolution(call: Call) -> int:
    """Every element of the input is spread over (output channels of its group) x kernel."""
    return prod(call.first("input", "self")) * prod(call["weight"][1:])


@formula("aten::convolution", "aten::_convolution", "aten::convolution_overrideable")
def general_convolution(call: Call) -> int:
    return transposed_convolution(call) if call["transposed"] else convolution(call)


@formula("aten::conv_tbc")
def convolution_tbc(call: Call) -> int:
    return prod(call.outputs[0]) * prod(call["weight"][:2])


@formula("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu")
def recurrent(call: Call) -> int:
    """Every weight matrix is applied once to every token: all layers, directions and the projection alike."""
    tokens = call["data"][0] if "data" in call.arguments else prod(call["input"][:-1])
    return tokens * sum(prod(shape) for shape in call["params"] if len(shape) == 2)


# --- normalisation, resampling, average pooling: fvcore's convention ---------------------------------------------------


@formula("aten::layer_norm", "aten::native_layer_norm", kind="norm")
@formula("aten::group_norm", "aten::native_group_norm", kind="norm")
@formula("aten::instance_norm", kind="norm")
def normalisation(call: Call) -> int:
    return prod(call["input"]) * (5 if call["weight"] is not None else 4)


@formula("aten::rms_norm", "aten::_fused_rms_norm", kind="norm")
def rms_norm(call: Call) -> int:
    """Not in fvcore. No mean is taken and subtracted, so two fewer than layer norm."""
    return prod(call["input"]) * (3 if call["weight"] is not None else 2)


@formula(
    "aten::batch_norm",
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_batch_norm_impl_index",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    kind="norm",
)
def batch_norm(call: Call) -> int:
    affine = call["weight"] is not None
    return prod(call["input"]) * ((5 if affine else 4) if call[5] else (2 if affine else 1))


@formula("aten::_native_batch_norm_legit_no_training", kind="norm")
def batch_norm_evaluation(call: Call) -> int:
    return prod(call["input"]) * (2 if call["weight"] is not None else 1)


def _taps(per_element: int) -> Formula:
    def count(call: Call) -> int:
        return prod(call.outputs[0]) * per_element

    return count


for _name, _per in {
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 1,
    "upsample_nearest3d": 1,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 1,
    "_upsample_nearest_exact3d": 1,
    "upsample_linear1d": 2,
    "upsample_bilinear2d": 4,
    "upsample_trilinear3d": 8,
    "upsample_bicubic2d": 16,
}.items():
    formula(f"aten::{_name}", kind="norm")(_taps(_per))


@formula("aten::grid_sampler", "aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::cudnn_grid_sampler", kind="norm")
def grid_sample(call: Call) -> int:
    """Taps of each output element: 2 an axis for (bi-, tri-)linear, 1 nearest, 16 bicubic."""
    axes = len(call["input"]) - 2 if "input" in call.arguments else 2
    mode = call.arguments.get("interpolation_mode", 0)
    return prod(call.outputs[0]) * {0: 2**axes, 1: 1, 2: 16}[mode]


@formula(
    "aten::adaptive_avg_pool1d",
    "aten::adaptive_avg_pool2d",
    "aten::adaptive_avg_pool3d",
    "aten::_adaptive_avg_pool2d",
    "aten::_adaptive_avg_pool3d",
    kind="norm",
)
def adaptive_pool(call: Call) -> int:
    return prod(call["self"])


@formula("aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d", kind="norm")
def average_pool(call: Call) -> int:
    axes = int(call.operator[-2])
    kernel = list(call["kernel_size"])
    return prod(call.outputs[0]) * prod(kernel if len(kernel) == axes else kernel * axes)


@formula(
    "aten::dropout",
    "aten::feature_dropout",
    "aten::alpha_dropout",
    "aten::feature_alpha_dropout",
    "aten::native_dropout",
    kind="elementwise",
)
def dropout(call: Call) -> int:
    return prod(call["input"]) if call["train"] and call["p"] else 0


# --- the other classes, by name ---------------------------------------------------------------------------------------


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Elements are those of the result (what is fetched), of the index (what is written), or the larger of first operand and
# result (what is looked at).
FETCHING = _words(
    """
    embedding embedding_bag _embedding_bag _embedding_bag_forward_only gather index index_select _unsafe_index masked_select
    take take_along_dim multinomial
    """
)
WRITING = _words(
    """
    index_add index_copy index_fill index_put _index_put_impl index_reduce masked_scatter put scatter scatter_add scatter_reduce
    _unsafe_index_put
    """
)
LOOKING = _words(
    """
    sort argsort msort topk kthvalue median nanmedian mode quantile nanquantile max min amax amin aminmax _aminmax argmax argmin
    cummax cummin max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d max_unpool2d
    max_unpool3d softmax log_softmax _softmax _log_softmax _safe_softmax _masked_softmax logsumexp logcumsumexp nonzero
    nonzero_numpy nonzero_static argwhere unique_consecutive unique_dim _unique _unique2 unique_dim_consecutive bincount histc
    searchsorted bucketize isin nll_loss nll_loss_forward nll_loss2d nll_loss2d_forward _ctc_loss lexsort
    """
)
# Names of one family, one class: the fast Fourier transforms are compared, not multiplied, in this account.
LOOKING_PREFIXES = ("fft_", "_fft_")

# Pointwise operators carry a tag of torch's; these reduce, or are pointwise without the tag.
REDUCING = _words(
    """
    sum nansum mean nanmean prod var std var_mean std_mean norm native_norm frobenius_norm linalg_vector_norm cumsum cumprod any
    all count_nonzero trace dist mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
    soft_margin_loss multi_margin_loss glu log_sigmoid_forward prelu _prelu_kernel hardswish rrelu_with_noise floor_divide polar
    complex bernoulli normal uniform exponential random cauchy geometric log_normal poisson binomial _masked_scale linalg_cross
    renorm _weight_norm_interface _thnn_fused_lstm_cell _thnn_fused_gru_cell affine_grid_generator col2im _is_all_true
    _is_any_true equal allclose isclose __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ __ixor__ linspace logspace
    _add_relu _standard_gamma _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    """
)
LAYOUT = _words(
    """
    cat concat concatenate stack _stack hstack vstack dstack column_stack contiguous clone copy _to_copy to type_as repeat tile
    repeat_interleave flip fliplr flipud roll rot90 pad _pad_circular _pad_enum constant_pad_nd reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle
    channel_shuffle native_channel_shuffle tril triu diag diag_embed diagflat block_diag im2col meshgrid broadcast_tensors
    cartesian_prod empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_empty_strided
    new_full new_ones new_zeros fill zero item _local_scalar_dense lift lift_fresh lift_fresh_copy detach _unsafe_view
    unsafe_chunk unsafe_split unsafe_split_with_sizes select_scatter slice_scatter diagonal_scatter as_strided_scatter
    fill_diagonal resize resize_as set record_stream pin_memory _pin_memory is_pinned is_nonzero is_same_size _assert_async
    _assert_tensor_metadata _linalg_check_errors _resize_output data is_complex is_floating_point is_signed result_type
    requires_grad numel size stride dim storage_offset _version _has_same_storage_numel atleast_1d atleast_2d atleast_3d
    _shape_as_tensor _reshape_from_tensor _copy_from _lazy_clone sym_size sym_numel sym_stride sym_storage_offset
    sym_is_contiguous _nested_tensor_from_tensor_list device layout transpose t squeeze unsqueeze swapaxes swapdims as_strided
    """
)

# Operators that multiply matrices inside and have no formula: never silently zero.
_MATMUL_WORDS = re.compile(
    r"mm(?![aiy])|gemm|matmul|attention|conv(?!ert)|rnn|lstm|gru_|gru$|(?<!upsample_)(?<!bi)linear|trilinear$|einsum"
)
_MATMUL_NAMES = _words(
    """
    _transformer_encoder_layer_fwd cholesky cholesky_inverse cholesky_solve _cholesky_solve_helper geqrf ormqr orgqr
    triangular_solve lu_unpack _compute_linear_combination svd qr smm sspaddmm hspmm pinverse matrix_exp _spsolve
    """
)
_LINALG_CHEAP = _words("linalg_vector_norm linalg_cross linalg_diagonal _linalg_check_errors")


def is_matmul_class(operator: str) -> bool:
    """Whether an operator of torch multiplies matrices (or factors them), judged by its name."""
    space, _, name = operator.partition("::")
    if space not in TORCH_SPACES:
        return False
    name = name.removesuffix("_")
    if name.startswith(("linalg_", "_linalg_")):
        return name not in _LINALG_CHEAP
    return name in _MATMUL_NAMES or bool(_MATMUL_WORDS.search(name))


# Namespaces of torch's own operators; every other one is a custom operator.
TORCH_SPACES = frozenset(("aten", "prim", "prims", "quantized", "mkldnn", "mkl", "onednn"))

# Namespaces that compute nothing: what a profiler notes, what ranks send each other.
SILENT_SPACES = frozenset(("profiler", "prim", "c10d", "_c10d_functional", "c10d_functional"))
