"""The fields of a training run about device, precision, memory and execution."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from bigbatch.lm.config.field_types import Checkpointing, Device, Gpu, MemoryText
from bigbatch.offload.levels import OffloadSetting


class MachineFields(BaseModel):
    """The fields of the group "machine" of ``--help``."""

    device: Device = Field(
        default="auto", description="auto, cpu, cuda, cuda:N or mps; auto = CUDA if available, else MPS, else CPU"
    )
    precision: Literal["auto", "float32", "float64", "bf16", "bf16-weights", "fp16", "fp8"] = Field(
        default="auto",
        description="bf16 and fp16 = autocast over float32 weights; bf16-weights = weights in bf16, gradient sums "
        "in float32, in less memory; fp8 = bf16 with the products of linear layers in float8, for a less exact "
        "gradient that depends on the micro-batch, on Ada, Hopper and Blackwell (pip install "
        '"bigbatch[fp8]"); auto = bf16 on CUDA, fp16 on GPUs without bf16 such as T4 and V100, float32 elsewhere',
    )
    logits: Literal["auto", "bf16"] = Field(
        default="auto",
        description="precision of the logits of large vocabularies before the loss, which is computed in float32. bf16 "
        "= less memory traffic and a less exact gradient, with --precision bf16, bf16-weights or fp8; auto = float32 "
        "where the product of the head can return it, on CUDA, else that of --precision",
    )
    memory: MemoryText | None = Field(
        default=None,
        description="memory that the run may use with --microbatch auto, such as 24GiB or 80%; set it to leave memory "
        "to other processes (default: what is free at the start, less a margin)",
    )
    gpu: Gpu | None = Field(
        default=None,
        description="memory limit by the name of a GPU, such as a100-40gb, instead of --memory: what is usually free "
        "on it. Accepts the names that nvidia-smi prints; a100 and v100 are those with less memory (default: none)",
    )
    gradient_checkpointing: Checkpointing = Field(
        default="auto",
        json_schema_extra={"alone": "full"},
        description="activation checkpointing: layers recompute their activations in backward instead of storing them, "
        "for less memory and about a third more time. none, selective (every second layer), full, or offload = full, "
        "with the inputs of layers in host memory between forward and backward; auto = the fastest of the first three "
        "that fits in memory with --microbatch auto, else none; without a value: full",
    )
    offload: OffloadSetting = Field(
        default="none",
        description="what lives in host memory between updates, with the same result: optimizer = the state of the "
        "optimizer, which passes through the device in each update; master = also the float32 values of the weights of "
        "linear layers, in bf16; gradients = also the gradient sums; all with --parallel ddp; none = nothing; auto = "
        "the level that is predicted to be the fastest that fits in memory",
    )
    layout: Literal["auto", "padded", "packed"] = Field(
        default="auto",
        description="padded = one row for each sequence; packed = one row without padding, in which sequences do not "
        "attend to one another; auto = packed on CUDA if a check of the model finds no difference",
    )
    attention: Literal["auto", "torch", "fa4"] = Field(
        default="auto",
        description="kernel of attention in packed rows on CUDA: that of torch, or FlashAttention-4 for Hopper and "
        'Blackwell (pip install "bigbatch[fa4]"); auto = the faster of the two if a check of the model finds no '
        "difference, and torch with --deterministic or --reproducible",
    )
    compile: Literal["auto", "none", "layers", "graphs"] = Field(
        default="auto",
        description="layers = compile the layers of the model, which takes some seconds; graphs = also capture and "
        "replay each micro-batch as a CUDA graph; none = run eagerly; auto = graphs on CUDA, layers "
        "there with --reproducible, none elsewhere",
    )
