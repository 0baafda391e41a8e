"""Turn a Llama's checkpoint into one of a linear model, and fit its new layers to the attention that they replace."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import LongTensor, Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from glalm.compat.llama import convert_llama, load_llama, require_convertible
from glalm.config.strict import ConfigError, RunError, require
from glalm.data.files import temporary_folder
from glalm.data.loader import Windows, training_batches
from glalm.data.order import Order
from glalm.data.shards import TokenSet, read_manifest, require_set
from glalm.hf import GLALMForCausalLM

logger = logging.getLogger(__name__)


@dataclass
class LinearizeOptions:
    """The options of glalm linearize, where they are documented.

    Raises ConfigError for what can be found before the Llama is loaded, which may take minutes.
    """

    llama: Path
    out: Path
    gguf: str | None = None
    mixer: str = "gla"
    softmax_layers: list[int] = field(default_factory=list)
    distil: int = 0  # steps
    data: Path | None = None
    batch_size: int = 8
    seq_len: int = 512
    lr: float = 1e-3
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    def __post_init__(self):
        require(not self.out.exists(), f"{self.out} exists. Choose another OUT")
        for name, minimum in (("distil", 0), ("batch_size", 1), ("seq_len", 1)):
            value = getattr(self, name)
            require(value >= minimum, f"--{name.replace('_', '-')} {value} must be at least {minimum}")
        require(0 < self.lr < math.inf, f"--lr {self.lr} must be positive and finite")
        for name in ("data", "batch_size", "seq_len", "lr"):
            option = f"--{name.replace('_', '-')}"
            is_default = getattr(self, name) == getattr(LinearizeOptions, name)
            require(
                self.distil > 0 or is_default,
                f"{option} is for --distil. Add --distil STEPS, such as --distil 500, or remove {option}",
            )
        if self.distil:
            require(self.data is not None, "--distil needs --data, the folder of a prepared set")
            try:
                torch.zeros(1, device=self.device).item()
            except (RuntimeError, AssertionError, ImportError) as error:  # torch raises any of them
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ConfigError(
                    f"--device {self.device} cannot be used here ({reason}). Choose cpu or cuda"
                ) from error
        require(self.llama.is_dir(), f"{self.llama} is not a folder. Name one with a config.json and safetensors")
        config = LlamaConfig.from_pretrained(self.llama, gguf_file=self.gguf, local_files_only=True)
        require_convertible(config, self.mixer, set(self.softmax_layers))
        if self.distil:
            is_all_softmax = len(set(self.softmax_layers)) == config.num_hidden_layers
            require(not is_all_softmax, "--softmax-layers names every layer, so --distil has none to fit. Remove one")
            open_windows(self, config.vocab_size)


def linearize_checkpoint(options: LinearizeOptions) -> None:
    """Write the converted model, its tokenizer and its config for `glalm train` to options.out.

    If that fails, or is killed, options.out does not exist. That it can be created is known before the Llama is loaded.

    Raises:
        ConfigError: The Llama cannot be converted.
        OSError: options.out cannot be created.
        RunError: The distillation diverged.
    """
    with temporary_folder(options.out) as folder:
        llama = load_llama(options.llama, options.gguf)
        torch.manual_seed(0)
        model = convert_llama(llama, options.mixer, options.softmax_layers)
        if options.distil:
            run_distillation(model, llama, options)
        model.save_pretrained(folder)
        try:
            # Of a GGUF file's tokenizer beside a tokenizer.json, transformers 5 forgets which token ends a document.
            gguf = None if (options.llama / "tokenizer.json").is_file() else options.gguf
            tokenizer = AutoTokenizer.from_pretrained(
                options.llama, gguf_file=gguf, local_files_only=True, trust_remote_code=False
            )
            tokenizer.save_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            advice = f"Copy the files of the model's tokenizer to {options.out} before you prepare data with it."
            logger.warning(f"No tokenizer was written ({reason}). {advice}")
        config_file = folder / "configs" / "model" / "linearized.yaml"
        config_file.parent.mkdir(parents=True)
        settings = OmegaConf.create(dataclasses.asdict(model.config.to_model_config()))
        config_file.write_text(OmegaConf.to_yaml(settings), encoding="utf-8")
        folder.rename(options.out)


def run_distillation(model: GLALMForCausalLM, llama: LlamaForCausalLM, options: LinearizeOptions) -> None:
    """Fit the linear mixers of `model` in place, for options.distil steps on options.device, and log the loss."""

    def require_finite(is_finite: bool, finding: str) -> None:
        if not is_finite:
            raise RunError(
                f"{finding}. The distillation diverged and nothing was written. Choose a lower --lr than {options.lr:g}"
            )

    llama.to(options.device, torch.bfloat16 if options.device != "cpu" else torch.float32)
    model.to(options.device)
    batches = read_batches(options, llama.vocab_size)
    print_every = max(1, options.distil // 20)
    for step, loss in enumerate(distil_mixers(model, llama, batches, options.lr), 1):
        require_finite(math.isfinite(loss), f"step {step}: the loss is {loss}")
        if step % print_every == 0 or step == 1:
            logger.info(f"step {step:5d}  relative error of the layers' outputs {loss:.4f}")
    model.cpu()
    with torch.no_grad():  # No loss was computed after the last update.
        logits = model(torch.arange(min(16, llama.vocab_size))[None]).logits
    require_finite(bool(logits.isfinite().all()), f"the logits after step {options.distil} are not finite")


def read_batches(options: LinearizeOptions, vocab_size: int) -> Iterator[LongTensor]:
    """Yield token ids [B, T] of the training split of options.data, one batch for each step of the distillation."""
    windows = open_windows(options, vocab_size)
    batches = training_batches(windows, Order(0, options.batch_size, windows.source_windows))
    for _ in range(options.distil):
        _, batch = next(batches)
        yield batch["input_ids"].to(options.device)


def open_windows(options: LinearizeOptions, vocab_size: int) -> Windows:
    """Return the windows of the training split of options.data.

    Raises:
        ConfigError: There is no prepared set, its vocabulary is larger than vocab_size, or it has no window of
            options.seq_len.
    """
    require_set(f"--data {options.data}", options.data)
    tokens = TokenSet(options.data, "train", read_manifest(options.data))
    require(
        tokens.vocab_size <= vocab_size,
        f"--data {options.data} has a vocabulary of {tokens.vocab_size}, but {options.llama} has one of {vocab_size}. "
        "Prepare the data with the tokenizer of that model (glalm prepare --tokenizer)",
    )
    try:
        return Windows(tokens, options.seq_len)
    except ValueError as error:
        raise ConfigError(f"--seq-len {options.seq_len}: {error}") from error


def distil_mixers(
    student: GLALMForCausalLM, teacher: LlamaForCausalLM, batches: Iterable[LongTensor], lr: float = 1e-3
) -> Iterator[float]:
    """Fit every linear mixer to the outputs of the attention that it replaces (LoLCATs, arXiv 2410.10254).

    Each mixer reads the inputs of the teacher's attention, so errors do not accumulate from layer to layer. Before the
    first step each head norm is scaled so that the outputs match the attention's in size; without that, they are
    several times larger. The teacher's dtype is the dtype of autocast. The student's weights are float32.

    Args:
        student: A model with at least one linear mixer.
        batches: Token ids [B, T], one batch for each step of AdamW.

    Yields:
        The loss of each step: squared error divided by the variance of the target, averaged over the layers.
    """
    mixers = {}
    for layer, (name, block) in enumerate(zip(student.config.layer_mixers(), student.model.layers, strict=True)):
        if name != "attention":
            mixers[layer] = block.attn
    parameters = [parameter for mixer in mixers.values() for parameter in mixer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    with capture_attention(teacher, mixers) as captured:
        for step, ids in enumerate(batches):
            with torch.no_grad():
                teacher.model(ids, use_cache=False)
            losses = []
            for layer, mixer in mixers.items():
                x, target = captured.pop(layer)
                if step == 0:
                    scale_head_norm(mixer, x, target)
                loss = (run_mixer(mixer, x) - target.float()).square().mean() / target.float().var()
                (loss / len(mixers)).backward()
                losses.append(loss.detach())
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield float(torch.stack(losses).mean())


@contextmanager
def capture_attention(teacher: LlamaForCausalLM, layers: Iterable[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Provide a dict that every forward pass fills with the attention's input and output [B, T, d] by layer."""
    captured = {}
    with ExitStack() as hooks:
        for layer in layers:

            def capture(module, args, kwargs, output, layer=layer):
                captured[layer] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0])

            attention = teacher.model.layers[layer].self_attn
            hooks.enter_context(attention.register_forward_hook(capture, with_kwargs=True))
        yield captured


def run_mixer(mixer: nn.Module, x: Tensor) -> Tensor:
    """Return the mixer's output in float32, computed by autocast to the dtype of x."""
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
        return mixer(x)[0].float()


@torch.no_grad()
def scale_head_norm(mixer: nn.Module, x: Tensor, target: Tensor) -> None:
    """Scale the norm on the heads' outputs so that the mixer's output for x is as large as `target`."""
    norm = mixer.g_norm if hasattr(mixer, "g_norm") else mixer.o_norm
    norm.weight *= target.float().std() / run_mixer(mixer, x).std()
