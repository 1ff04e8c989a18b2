"""SageAttention2++ as CUDA kernels compiled at run time, with a NumPy reference of the same bits.

>>> import sagepp
>>> o = sagepp.attention(q, k, v, is_causal=True)

Importing this package imports NumPy and ml_dtypes and nothing else: CuPy and the kernels are loaded
by the first call that needs them.
"""

import os

__version__ = "0.1.0"

# In a checkout `reference` and `kernels_src` stand beside this folder; an installation puts them in
# it. This line makes both importable from a checkout that was not installed.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_checkout, "kernels_src", "__init__.py")):
    __path__.append(_checkout)

from .api import attention  # noqa: E402

__all__ = ["attention"]
