"""What each primitive means for the parameters that enter it: another view of a leaf, a layer, or neither."""

from optax_curv.capture import elementwise, products, views
from optax_curv.capture.jaxpr import KEEP_ENTRIES

RULES = {
    **dict.fromkeys(KEEP_ENTRIES, views.layout),
    "split": views.split,
    "unstack": views.unstack,
    "dynamic_slice": views.dynamic_slice,
    "stack": views.stack,
    "dot_general": products.dot_general,
    "conv_general_dilated": products.convolution,
    "gather": products.gather,
    "mul": elementwise.multiply,
    "div": elementwise.divide,
    "neg": elementwise.negate,
    "add": elementwise.add,
    "add_any": elementwise.add,
    "sub": elementwise.add,
    "select_n": elementwise.select,
    "concatenate": elementwise.concatenate,
}
