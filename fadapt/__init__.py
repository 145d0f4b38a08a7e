"""Functional, stateless adapters for PyTorch, over dense and quantized bases."""

from fadapt.adapter import count, fold, init, scale_by
from fadapt.aqlm_merge import Recode
from fadapt.aqlm_tune import finetune_aqlm
from fadapt.bank import Bank
from fadapt.bases import Base, Conv, Dense, Embedding, base_of, register_base
from fadapt.batching import Mixed, bind_mixed
from fadapt.calibration import calibrate, input_amax
from fadapt.combine import combine
from fadapt.describe import Description, describe
from fadapt.dora import DoRA, DoRANormed, DoRAParams
from fadapt.export import check_export, export
from fadapt.export_run import load_export
from fadapt.functional import Forward, bind
from fadapt.generation import generate
from fadapt.gradients import value_and_grad, vjp
from fadapt.graphs import cuda_graph
from fadapt.lora import LoRA, LoRABiasParams, LoRAParams
from fadapt.lora_conv import ConvLoRA as _ConvLoRA  # noqa: F401 - registers it
from fadapt.lora_embedding import LoRAEmbeddingParams
from fadapt.merge_report import LayerReport, MergeComparison, MergeReport, merge_report
from fadapt.merging import merge, merged_model
from fadapt.method import Method
from fadapt.oft import OFT, OFTParams, OFTRotation
from fadapt.peft import load_peft, save_peft
from fadapt.progress import progress_bar
from fadapt.random import dropout_seeds
from fadapt.remainder import merge_with_remainder
from fadapt.stacking import StackedLoRA, stack, unstack
from fadapt.unmerging import unmerge, unmerged_model

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "Base",
    "Conv",
    "Dense",
    "Description",
    "DoRA",
    "DoRANormed",
    "DoRAParams",
    "Embedding",
    "Forward",
    "LayerReport",
    "LoRA",
    "LoRABiasParams",
    "LoRAEmbeddingParams",
    "LoRAParams",
    "MergeComparison",
    "MergeReport",
    "Method",
    "Mixed",
    "OFT",
    "OFTParams",
    "OFTRotation",
    "Recode",
    "StackedLoRA",
    "base_of",
    "bind",
    "bind_mixed",
    "check_export",
    "combine",
    "calibrate",
    "count",
    "cuda_graph",
    "describe",
    "dropout_seeds",
    "export",
    "finetune_aqlm",
    "fold",
    "generate",
    "init",
    "input_amax",
    "load_export",
    "load_peft",
    "merge",
    "merge_report",
    "merge_with_remainder",
    "merged_model",
    "progress_bar",
    "register_base",
    "save_peft",
    "scale_by",
    "stack",
    "unmerge",
    "unmerged_model",
    "unstack",
    "value_and_grad",
    "vjp",
]
