"""The original's side of the benchmarks: its own code, imported from a folder, as it is.

Lives in a process of its own (worker.py). It is given two replacements:

- flash_attn, where it is missing: its one function, for rows of one length, by torch's own
  scaled_dot_product_attention, which takes the same kernel where the device has it;
- torch.cuda.amp.autocast, through which the original asks for bfloat16 and LayerNorm asks for
  float32: it acts on the device that there is and in the requested dtype. So on a CPU,
  where that call does nothing, bfloat16 is where it is on a GPU, and float32 can be had on both.

compiled: its network by torch.compile, whole: with TorchScript off (PYTORCH_JIT=0), so that what
the original scripts by hand is the compiler's too, and with flash_attn's rotary embedding in plain
torch where flash_attn is missing: the original's own way around that is one that torch.compile
cannot follow, so it would leave the network as it is.
"""

import importlib.util
import itertools
import os
import sys
import types
import warnings
from typing import Any


class Original:
    """The original's training step and sampler at one size and dtype."""

    def __init__(self, side: dict[str, Any], size: dict[str, Any]):
        if side["compiled"]:
            os.environ["PYTORCH_JIT"] = "0"  # before torch is imported
        sys.path.insert(0, side["path"])
        warnings.filterwarnings("ignore")  # of its old names for autocast and GradScaler
        import torch

        self.torch = torch
        self.is_accelerator = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.is_accelerator else "cpu")
        self.is_compiled = side["compiled"]
        self.size, self.compiles = size, 0
        replace_attention(torch, with_rotary=self.is_compiled)
        replace_autocast(torch, self.device.type, side["dtype"] == "bfloat16")
        torch.manual_seed(0)

        import graph_lib
        import losses
        import noise_lib
        import sampling
        from model import SEDD
        from model.ema import ExponentialMovingAverage
        from omegaconf import OmegaConf

        self.graph_lib, self.losses, self.noise_lib = graph_lib, losses, noise_lib
        self.sampling, self.SEDD, self.Average = sampling, SEDD, ExponentialMovingAverage
        self.OmegaConf = OmegaConf

    def about(self) -> dict[str, Any]:
        about = {"framework": f"torch {self.torch.__version__}", "device": "cpu"}
        if self.is_accelerator:
            about["device"] = self.torch.cuda.get_device_name(self.device)
        return about

    def _build(self, length: int) -> tuple[Any, Any, Any, Any]:
        """Config, graph, noise and network, as the original's run_train.py makes them."""
        size = self.size
        model = {name: size[name] for name in ("hidden_size", "cond_dim", "dropout")}
        model |= {"length": length, "n_blocks": size["blocks"], "n_heads": size["heads"]}
        adam = {"optimizer": "AdamW", "lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        config = self.OmegaConf.create(
            {
                "tokens": size["vocab_size"],
                "graph": {"type": "absorb"},
                "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
                "model": model | {"scale_by_sigma": True},
                "training": {"ema": 0.9999},
                "optim": adam | {"weight_decay": 0, "warmup": 2500, "grad_clip": 1.0},
            }
        )
        graph = self.graph_lib.get_graph(config, self.device)
        noise = self.noise_lib.get_noise(config).to(self.device)
        network = self.SEDD(config).to(self.device)
        with self.torch.no_grad():  # head and modulation start at zero; see Ours._without_zeros
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        if self.is_compiled:
            network = self.torch.compile(network)
        return config, graph, noise, network

    # --- training

    def start_training(self, batch_size: int, length: int) -> dict[str, Any]:
        torch = self.torch
        self._forget()
        config, graph, noise, network = self._build(length)
        optimizer = self.losses.get_optimizer(
            config, itertools.chain(network.parameters(), noise.parameters())
        )
        self.state = {
            "optimizer": optimizer,
            "scaler": torch.cuda.amp.GradScaler(),  # does nothing on a CPU
            "model": network,
            "noise": noise,
            "ema": self.Average(network.parameters(), decay=config.training.ema),
            "step": 0,
        }
        optimize = self.losses.optimization_manager(config)
        self.step = self.losses.get_step_fn(noise, graph, True, optimize, 1)
        shape = (batch_size, length)
        self.batch = torch.randint(0, self.size["vocab_size"], shape, device=self.device)
        parameters = sum(p.numel() for p in network.parameters())
        # Weights, AdamW's two moments and the average.
        sizes = {"state_bytes": 16 * parameters, "temporary_bytes": None}
        return sizes | {"parameters": parameters}

    def train(self, steps: int) -> float:
        for _ in range(steps):
            loss = self.step(self.state, self.batch)
        self._wait()
        return float(loss)

    # --- sampling

    def start_sampling(self, batch_size: int, length: int) -> dict[str, int]:
        self._forget()
        _, self.graph, self.noise, self.network = self._build(length)
        self.shape = (batch_size, length)
        return {"parameters": sum(p.numel() for p in self.network.parameters())}

    def sample(self, steps: int) -> int:
        run = self.sampling.get_pc_sampler(
            self.graph, self.noise, self.shape, "analytic", steps, device=self.device
        )
        tokens = run(self.network).cpu()
        return int((tokens >= self.size["vocab_size"]).sum())

    # --- the device

    def matmul(self, side: int, dtype: str) -> Any:
        torch = self.torch
        a, b = torch.randn(2, side, side, device=self.device).to(getattr(torch, dtype))

        def run():
            torch.matmul(a, b)
            self._wait()

        return run

    def device_peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.is_accelerator else None

    def forget_device_peak(self) -> None:
        if self.is_accelerator:
            self.torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self.is_accelerator:
            self.torch.cuda.synchronize()

    def _forget(self) -> None:
        """Let go of the last network and of what torch keeps for it."""
        self.state = self.step = self.network = self.batch = None
        if self.is_accelerator:
            self.torch.cuda.empty_cache()


def replace_attention(torch: Any, with_rotary: bool) -> None:
    """flash_attn's function for packed rows of one length, if there is no flash_attn."""
    if importlib.util.find_spec("flash_attn"):
        return

    def attention(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, causal=False):
        rows = qkv.unflatten(0, (-1, max_seqlen))  # [B, L, 3, H, K]
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=causal
        )
        return out.transpose(1, 2).flatten(0, 1)

    def rotary(qkv, cos, sin):  # [B, L, 3, H, K] and [L, K/2]; v is not rotated
        left, right = qkv[:, :, :2].chunk(2, dim=-1)
        cos, sin = cos[:, None, None], sin[:, None, None]
        rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
        return torch.cat([rotated, qkv[:, :, 2:]], dim=2)

    def module(name: str) -> types.ModuleType:
        made = sys.modules[name] = types.ModuleType(name)
        made.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)
        return made

    module("flash_attn")
    module("flash_attn.flash_attn_interface").flash_attn_varlen_qkvpacked_func = attention
    if with_rotary:
        module("flash_attn.layers")
        module("flash_attn.layers.rotary").apply_rotary_emb_qkv_ = rotary
    else:
        sys.modules["flash_attn.layers"] = None  # its import fails at once, not after a search


def replace_autocast(torch: Any, device: str, low: bool) -> None:
    """torch.cuda.amp.autocast of this device: to bfloat16 if `low`, else to nothing."""

    def autocast(enabled: bool = True, dtype: Any = None, cache_enabled: bool | None = None):
        return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled and low)

    torch.cuda.amp.autocast = autocast
