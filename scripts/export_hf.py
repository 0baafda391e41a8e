"""Makes a folder that transformers loads from a checkpoint of a run: weights, tokenizer, generation config, card.

Also of a checkpoint that several processes wrote a part of each, which from_pretrained does not read itself.

python scripts/export_hf.py runs/demo --out exported/demo
python -c "import glalm.hf; from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported/demo')"
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, GenerationConfig, LlamaTokenizer, PreTrainedTokenizerBase

from glalm.config.run import DATA_RECORD
from glalm.config.strict import RunError, build_dataclass
from glalm.data.shards import read_manifest
from glalm.data.tokenizer import PROBE, Tokenizer
from glalm.evals.options import TrainingRun
from glalm.hf import GLALMConfig, GLALMForCausalLM
from glalm.train import checkpoint
from glalm.train.run_dir import find_checkpoint

SAMPLE = PROBE.replace("<s></s>", "") + " The quick brown fox, (1 + 2) * 3 == 9;\n\n\tdef f(x):\n        return x\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--checkpoint", default="latest", help="latest, or step_N")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    args = parser.parse_args()
    try:
        export(args.run, args.checkpoint, args.out)
    except (RunError, OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(f"{args.out}: load it with AutoModelForCausalLM.from_pretrained, after `import glalm.hf`")


def export(run: Path, name: str, out: Path) -> None:
    """Makes `out`, or nothing. Raises CheckpointError when the checkpoint is missing or damaged, RunError when `out`
    exists, when the data that the run was trained on has another tokenizer now or one that transformers reads
    otherwise, FileNotFoundError when it is gone."""
    if out.exists():
        raise RunError(f"{out} exists; choose another --out")
    path = find_checkpoint(run / "checkpoints", name)
    record = json.loads((run / "run.json").read_text())
    config = build_dataclass(TrainingRun, record["config"])
    model = GLALMForCausalLM(GLALMConfig.from_model_config(config.model))
    checkpoint.verify_checkpoint(path)
    state = checkpoint.load_model(path, model)
    tokenizer = Path(config.data.path) / read_manifest(Path(config.data.path))["tokenizer"]["name"]
    ours = Tokenizer(tokenizer)
    if ours.fingerprint != json.loads((run / DATA_RECORD).read_text())["tokenizer"]["fingerprint"]:
        raise RunError(
            f"{config.data.path} has another tokenizer now than {run} was trained with; prepare it with that"
        )
    theirs = transformers_tokenizer(tokenizer, ours)
    model.config.bos_token_id, model.config.eos_token_id = ours.bos_id, ours.eos_id
    # For evaluators. Not as max_position_embeddings, which generate() would take for a limit.
    model.config.train_length, model.config.document_boundaries = config.data.seq_len, config.data.document_boundaries
    model.generation_config = GenerationConfig(
        bos_token_id=ours.bos_id, eos_token_id=ours.eos_id, pad_token_id=ours.eos_id, do_sample=True, temperature=0.8
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        model.save_pretrained(folder)
        theirs.save_pretrained(folder)
        if tokenizer.is_file():
            shutil.copy(tokenizer, folder)
        (folder / "README.md").write_text(card(run, path, record, config, model, state))
        folder.rename(out)


def transformers_tokenizer(path: Path, ours: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers has it; RunError if it gives other ids than those that the model was trained on."""
    theirs = AutoTokenizer.from_pretrained(path) if path.is_dir() else llama_tokenizer(path, ours)
    if theirs.pad_token is None:
        theirs.pad_token = theirs.convert_ids_to_tokens(ours.eos_id)
    return theirs


def llama_tokenizer(path: Path, ours: Tokenizer) -> LlamaTokenizer:
    for adds_space in (False, True):  # SentencePiece models differ in it, and transformers does not ask them
        theirs = LlamaTokenizer.from_pretrained(
            path.parent, legacy=False, add_prefix_space=adds_space, add_bos_token=bool(ours.bos_ids)
        )
        if same_ids(ours, theirs):
            return theirs
    raise RunError(
        f"transformers reads {path} to other ids than SentencePiece, so nothing was exported: it takes every model for "
        "byte-pair encoding (scripts/train_tokenizer.py --type bpe), and a run on a unigram one has no export"
    )


def same_ids(ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> bool:
    texts = [SAMPLE, *SAMPLE.splitlines()]
    return all(ours.encode(t) == theirs.encode(t, add_special_tokens=False) for t in texts)


def card(run: Path, path: Path, record: dict, config: TrainingRun, model: GLALMForCausalLM, state: dict) -> str:
    """A model card: what it is, how to use it, the recipe, the scores."""
    parameters = sum(p.numel() for p in model.parameters())
    optim = config.optim
    recipe = {
        "parameters": f"{parameters:,}",
        "architecture": f"{config.model.num_hidden_layers} layers, width {config.model.hidden_size}, "
        f"{config.model.num_heads} heads, vocabulary {config.model.vocab_size:,}",
        "training tokens": f"{state['tokens']:,} ({state['step']:,} steps of {config.tokens_per_step:,})",
        "data": Path(config.data.path).name,
        "sequence length": config.data.seq_len,
        "optimiser": f"{optim.name}, {optim.schedule} schedule, peak {optim.lr:g}, floor {optim.min_lr:g}, "
        f"{config.warmup_steps} steps of warm-up, weight decay {optim.weight_decay:g}, clip {optim.grad_clip:g}",
        "seed": config.seed,
        "checkpoint": f"{path.name}, weights sha256 {checkpoint.weights_sha256(path)}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [glalm]", "---", ""]
    lines += [f"# {config.name}", "", "A causal language model, pretrained with glalm.", "", "```python"]
    lines += [
        "import glalm.hf  # registers the architecture",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
    ]
    lines += [
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]
    lines += ["```", "", "## Recipe", "", "| | |", "|-|-|", *(f"| {k} | {v} |" for k, v in recipe.items())]
    lines += ["", "## Scores", "", *(scores(run, path) or ["None were measured for this checkpoint."])]
    shown = {k: v for k, v in record["config"].items() if k != "runs_dir"}
    shown |= {"data": shown["data"] | {"path": Path(config.data.path).name}}  # not where they lie on this machine
    lines += ["", "## Config", "", "```json", json.dumps(shown, indent=1), "```", ""]
    return "\n".join(lines)


def scores(run: Path, path: Path) -> list[str]:
    """A table of the metrics in the run's eval/*.json that were measured on these weights."""
    rows, weights = [], checkpoint.weights_sha256(path)
    for file in sorted((run / "eval").glob("*.json")):
        result = json.loads(file.read_text())
        if result.get("checksum") == weights:
            numbers = {k: v for k, v in result["metrics"].items() if v is not None}
            rows += [f"| {file.stem} | {name} | {number:,.4g} |" for name, number in numbers.items()]
    return ["| evaluation | metric | value |", "|-|-|-|", *rows] if rows else []


if __name__ == "__main__":
    main()
