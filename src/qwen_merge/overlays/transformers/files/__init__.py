"""Qwen2_5_VL_Merge, put here by `qwen-merge overlay apply transformers`."""

import sys
from typing import TYPE_CHECKING

from transformers.utils import _LazyModule
from transformers.utils.import_utils import define_import_structure

if TYPE_CHECKING:
    from .configuration_qwen2_5_vl_merge import *
    from .modeling_qwen2_5_vl_merge import *
    from .vision_qwen2_5_vl_merge import *
else:
    sys.modules[__name__] = _LazyModule(__name__, __file__, define_import_structure(__file__), module_spec=__spec__)
