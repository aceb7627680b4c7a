"""Recipes that are refused, each with every line that is printed about it. Add a case: copy a line, change it.

`after_good` puts the text behind a good recipe of two lines, so its own first line is line 3.
"""

from typing import NamedTuple

GOOD = """\
model: {path: org/model}
data: {train: rows.jsonl}
"""


class Bad(NamedTuple):
    name: str
    text: str | bytes
    lines: list[str]  # as printed, less the name of the file and its colon
    sets: list[str] = []  # noqa: RUF012 (never changed)


def after_good(text: str) -> str:
    return GOOD + text


BAD = [
    # Text that is no recipe.
    Bad("empty file", "", ["1: the recipe is empty — it needs at least model.path and data.train"]),
    Bad(
        "only comments",
        "# model: {path: m}\n",
        ["1: the recipe is empty — it needs at least model.path and data.train"],
    ),
    Bad("only a document mark", "---\n", ["1: the recipe is empty — it needs at least model.path and data.train"]),
    Bad(
        "list at the top",
        """\
- model
- data
""",
        ["1: a list at the top — a recipe is made of sections: `model:`, `data:`, ..."],
    ),
    Bad(
        "word at the top",
        "hello\n",
        ["1: a single value at the top — a recipe is made of sections: `model:`, `data:`, ..."],
    ),
    Bad(
        "number at the top",
        "3\n",
        ["1: a single value at the top — a recipe is made of sections: `model:`, `data:`, ..."],
    ),
    Bad(
        "two documents",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
---
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["3: a second document starts here — a file holds one recipe: remove `---`"],
    ),
    Bad(
        "latin-1",
        b"model: {path: org/model}\ndata: {train: caf\xe9.jsonl}\n",
        ["2: byte 0xe9 is not UTF-8 — save the file as UTF-8"],
    ),
    Bad(
        "utf-16",
        b"\xff\xfem\x00o\x00d\x00e\x00l\x00:\x00 \x00{\x00p\x00a\x00t\x00h\x00:\x00 \x00m\x00}\x00\n\x00",
        ["1: byte 0xff is not UTF-8 — save the file as UTF-8"],
    ),
    Bad("control character", after_good('output: "a\x07b"\n'), ["3: a control character (U+0007) — remove it"]),
    Bad("tab as indentation", "model:\n\tpath: org/model\n", ["2: a tab in the indentation — indent with spaces"]),
    Bad(
        "tab after spaces", "model:\n  path: m\n \trevision: x\n", ["3: a tab in the indentation — indent with spaces"]
    ),
    Bad(
        "bracket left open",
        after_good("""\
adapter:
  target_modules: [q_proj, k_proj
output: runs/x
"""),
        ["4: a `[` is not closed — close it, with commas between the values"],
    ),
    Bad(
        "brace left open",
        """\
model: {path: org/model
data: {train: rows.jsonl}
""",
        ["1: a `{` is not closed — close it, with commas between the entries"],
    ),
    Bad(
        "quote left open",
        after_good("""\
output: "runs/x
task: causal-lm
"""),
        ["3: a quote is not closed — close it"],
    ),
    Bad(
        "two colons",
        "model: path: org/model\n",
        ["1: a `:` where no key can stand — check the indentation, or quote the value"],
    ),
    Bad(
        "indented between",
        """\
model:
  path: org/model
 revision: main
""",
        ["3: the indentation fits no line above — indent it like its neighbours"],
    ),
    Bad(
        "line without a colon",
        after_good("""\
training
output: runs/x
"""),
        ["4: a line that is neither `key: value` nor part of a list — add the `:`"],
    ),
    Bad(
        "at sign", after_good("output: @runs\n"), ["3: a character that cannot start a value — put the value in quotes"]
    ),
    Bad(
        "backtick",
        after_good("output: `runs`\n"),
        ["3: a character that cannot start a value — put the value in quotes"],
    ),
    Bad(
        "percent sign",
        after_good("output: %runs\n"),
        ["3: a character that cannot start a value — put the value in quotes"],
    ),
    Bad(
        "unknown escape",
        after_good('output: "runs\\q"\n'),
        ["3: an unknown escape in double quotes — use single quotes, or write \\\\ for \\"],
    ),
    Bad(
        "escape past Unicode",
        after_good('output: "\\U00110000"\n'),
        ["3: not valid YAML: a number out of range — check the escapes in quotes"],
    ),
    Bad(
        "half a character",
        after_good('output: "\\uD800"\n'),
        ["3: output: an escape that stands for no character — write the character itself"],
    ),
    Bad(
        "null character",
        after_good('output: "a\\0b"\n'),
        ["3: output: an escape that stands for no character — write the character itself"],
    ),
    Bad(
        "dash in a mapping",
        after_good("training: - epochs\n"),
        ["3: not valid YAML: sequence entries are not allowed here — check it in an editor that knows YAML"],
    ),
    # Anchors, tags, keys.
    Bad(
        "anchor inside itself",
        after_good("adapter: &a {target_modules: [*a]}\n"),
        ["3: adapter.target_modules[0]: *a refers to the value that it is part of — write the value out"],
    ),
    Bad(
        "alias to nothing",
        after_good("adapter: *lora\n"),
        ["3: adapter: *lora refers to no anchor above it — write &lora before the value meant"],
    ),
    Bad(
        "alias bomb",
        """\
a: &a [x,x,x,x,x,x,x,x,x]
b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]
c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]
d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]
e: [*d,*d,*d,*d,*d,*d,*d,*d,*d]
""",
        ["4: d[4]: more than 5,000 values, aliases written out — a recipe has about fifty"],
    ),
    Bad(
        "merge key",
        after_good("""\
training: &t {seed: 1}
adapter: {<<: *t}
"""),
        ["4: adapter.<<: merge keys are not supported — write the keys out, or alias single values"],
    ),
    Bad(
        "Python tag",
        after_good("output: !!python/object/apply:os.system [ls]\n"),
        [
            "3: output: YAML tag !!python/object/apply:os.system — remove it: tags are not supported",
            "3: output: a list where one value is due — text",
        ],
    ),
    Bad("own tag", after_good("output: !env RUNS\n"), ["3: output: YAML tag !env — remove it: tags are not supported"]),
    Bad(
        "standard tag",
        after_good("training: {seed: !!int 3}\n"),
        ["3: training.seed: YAML tag !!int — remove it: tags are not supported"],
    ),
    Bad(
        "key twice",
        after_good("""\
output: a
task: causal-lm
output: b
"""),
        ["5: output: written twice, in lines 3 and 5 — keep one"],
    ),
    Bad(
        "key twice in a section",
        after_good("""\
training:
  seed: 1
  epochs: 2
  seed: 3
"""),
        ["6: training.seed: written twice, in lines 4 and 6 — keep one"],
    ),
    Bad(
        "key twice in one line",
        after_good("training: {seed: 1, seed: 2}\n"),
        ["3: training.seed: written twice — keep one"],
    ),
    Bad("number as key", after_good("1: x\n"), ['3: 1: a key that is no text — put it in quotes: "1"']),
    Bad("boolean as key", after_good("true: x\n"), ['3: true: a key that is no text — put it in quotes: "true"']),
    Bad(
        "list as key",
        after_good("""\
? [a]
: x
"""),
        ["3: a list or section as a key — keys are words"],
    ),
    Bad(
        "nothing as key", after_good(": x\n"), ["3: the indentation fits no line above — indent it like its neighbours"]
    ),
    Bad(
        "column named by a number",
        """\
model: {path: m}
data:
  train: rows.jsonl
  columns: {text: a, 2: b}
""",
        ['4: data.columns.2: a key that is no text — put it in quotes: "2"'],
    ),
    Bad(
        "nested too deep",
        after_good("x: [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]\n"),
        [
            "3: x[0][0][0][0][0][0][0][0][0][0][0][0][0][0][0]: nested more than 16 levels deep — a recipe has four: check the brackets"
        ],
    ),
    # Keys that are missing.
    Bad("no model", "data: {train: rows.jsonl}\n", ["1: model: missing — add `model: {path: ...}`"]),
    Bad("no data", "model: {path: org/model}\n", ["1: data: missing — add `data: {train: ...}`"]),
    Bad(
        "neither",
        "output: runs/x\n",
        ["1: model: missing — add `model: {path: ...}`", "1: data: missing — add `data: {train: ...}`"],
    ),
    Bad(
        "no path",
        """\
model: {revision: main}
data: {train: rows.jsonl}
""",
        ["1: model.path: missing — Hub id, local folder, or a `.gguf` file (loaded dequantised)"],
    ),
    Bad(
        "no train",
        """\
model: {path: m}
data:
  eval: 0.1
""",
        ["2: data.train: missing — Rows to train on: a path or hub dataset id, or a list of sources"],
    ),
    Bad(
        "source without path",
        """\
model: {path: m}
data:
  train:
    - split: train
""",
        [
            "4: data.train[0].path: missing — File (.jsonl .json .csv .parquet .txt), folder of them or saved by `datasets`, or hub dataset id"
        ],
    ),
    Bad(
        "value left out",
        after_good("""\
training:
  eval_every:
"""),
        ["4: training.eval_every: has no value — write one, or remove the key"],
    ),
    Bad("section left out", after_good("training:\n"), ["3: training: has no value — write one, or remove the key"]),
    Bad(
        "list item left out",
        after_good("""\
adapter:
  target_modules:
    - q_proj
    -
"""),
        ["6: adapter.target_modules[1]: has no value — write one, or remove the key"],
    ),
    # Unknown keys: misspelt, misplaced, nested wrongly.
    Bad("misspelt", after_good("adapter: {rnak: 8}\n"), ["3: adapter.rnak: unknown key — did you mean rank?"]),
    Bad("misspelt section", after_good("adaptor: {rank: 8}\n"), ["3: adaptor: unknown key — did you mean adapter?"]),
    Bad(
        "dashes",
        after_good("training: {learning-rate: 1e-4}\n"),
        ["3: training.learning-rate: unknown key — here it is learning_rate"],
    ),
    Bad(
        "camel case",
        after_good("training: {maxSteps: 10}\n"),
        ["3: training.maxSteps: unknown key — here it is max_steps"],
    ),
    Bad("at the top", after_good("rank: 8\n"), ["3: rank: unknown key — it belongs elsewhere: adapter.rank"]),
    Bad(
        "in another section",
        after_good("training: {dropout: 0.1}\n"),
        ["3: training.dropout: unknown key — it belongs elsewhere: adapter.dropout"],
    ),
    Bad(
        "dotted",
        after_good("training.epochs: 2\n"),
        ["3: training.epochs: unknown key — nest it: `training: {epochs: ...}`"],
    ),
    Bad(
        "like no other",
        after_good("zzz: 1\n"),
        [
            "3: zzz: unknown key — the keys here are model, task, quantization, adapter, data, training, distributed and output"
        ],
    ),
    Bad(
        "like no other in a section",
        after_good("distributed: {zzz: 1}\n"),
        ["3: distributed.zzz: unknown key — the keys here are strategy and processes"],
    ),
    Bad(
        "two places",
        after_good("""\
bits: 4
seed: 1
"""),
        [
            "3: bits: unknown key — it belongs elsewhere: quantization.bits",
            "4: seed: unknown key — it belongs elsewhere: training.seed",
        ],
    ),
    Bad(
        "in a source",
        """\
model: {path: m}
data:
  train:
    - {path: a.jsonl, wieght: 2}
""",
        ["4: data.train[0].wieght: unknown key — did you mean weight?"],
    ),
    Bad(
        "its value matters not",
        after_good("adapter: {rnak: }\n"),
        ["3: adapter.rnak: unknown key — did you mean rank?"],
    ),
    # Other tools' keys.
    Bad(
        "axolotl",
        """\
base_model: org/model
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
adapter: qlora
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens]
wandb_project: x
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
output_dir: ./out
""",
        [
            "1: base_model: unknown key — here it is model.path",
            "2: load_in_4bit: unknown key — write `quantization: {bits: 4}`",
            "3: datasets: unknown key — here it is data.train",
            "6: val_set_size: unknown key — here it is data.eval",
            "7: adapter: qlora where a section is due — write `adapter: {method: lora}` and `quantization: {bits: 4}`",
            "8: sequence_len: unknown key — here it is data.max_length",
            "9: sample_packing: unknown key — here it is data.packing",
            "10: pad_to_sequence_len: unknown key — leave it out: packed batches have no padding",
            "11: lora_r: unknown key — here it is adapter.rank",
            "12: lora_alpha: unknown key — here it is adapter.alpha",
            "13: lora_dropout: unknown key — here it is adapter.dropout",
            "14: lora_target_linear: unknown key — write `adapter: {target_modules: all-linear}`, the default",
            "15: lora_modules_to_save: unknown key — leave it out: only adapters are trained, no whole module",
            "16: wandb_project: unknown key — leave it out: metrics.jsonl in the run folder has every step",
            "17: gradient_accumulation_steps: unknown key — here it is training.gradient_accumulation",
            "18: micro_batch_size: unknown key — here it is training.tokens_per_batch, or training.batch_size with `packing: false`",
            "19: num_epochs: unknown key — here it is training.epochs",
            "20: optimizer: unknown key — it belongs elsewhere: training.optimizer",
            "21: lr_scheduler: unknown key — here it is training.schedule",
            "22: learning_rate: unknown key — it belongs elsewhere: training.learning_rate",
            "23: train_on_inputs: unknown key — write `data: {loss_on: all}` for true; for false leave it out",
            "24: bf16: unknown key — write `model: {dtype: bfloat16}`",
            "25: tf32: unknown key — leave it out: there is no such switch here",
            "26: flash_attention: unknown key — write `model: {attention: flash_attention_2}`",
            "27: warmup_steps: unknown key — here it is training.warmup",
            "28: evals_per_epoch: unknown key — write training.eval_every in steps",
            "29: saves_per_epoch: unknown key — write training.save_every in steps",
            "30: output_dir: unknown key — here it is output",
        ],
    ),
    Bad(
        "LLaMA-Factory",
        """\
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
quantization_bit: 4
quantization_type: nf4
double_quantization: true
per_device_train_batch_size: 1
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
fp16: true
mask_history: true
neat_packing: true
flash_attn: fa2
val_size: 0.1
eval_strategy: steps
resume_from_checkpoint: null
""",
        [
            "1: model_name_or_path: unknown key — here it is model.path",
            "2: stage: unknown key — leave it out: the task is supervised fine-tuning",
            "3: do_train: unknown key — leave it out: `lora train` trains",
            "4: finetuning_type: unknown key — write `adapter: {method: lora}`; full fine-tuning is not offered",
            "5: lora_rank: unknown key — here it is adapter.rank",
            "6: lora_target: unknown key — here it is adapter.target_modules",
            "7: dataset: unknown key — here it is data.train",
            "8: template: unknown key — here it is data.chat_template",
            "9: cutoff_len: unknown key — here it is data.max_length",
            "10: max_samples: unknown key — the keys here are model, task, quantization, adapter, data, training, distributed and output",
            "11: overwrite_cache: unknown key — leave it out: the cache is keyed by what went into it",
            "12: preprocessing_num_workers: unknown key — leave it out: rows are encoded once, and cached",
            "13: quantization_bit: unknown key — here it is quantization.bits",
            "14: quantization_type: unknown key — here it is quantization.type",
            "15: double_quantization: unknown key — here it is quantization.double_quant",
            "16: per_device_train_batch_size: unknown key — here it is training.tokens_per_batch, or training.batch_size with `packing: false`",
            "17: num_train_epochs: unknown key — here it is training.epochs",
            "18: lr_scheduler_type: unknown key — here it is training.schedule",
            "19: warmup_ratio: unknown key — here it is training.warmup",
            "20: fp16: unknown key — write `model: {dtype: float16}`",
            "21: mask_history: unknown key — write `data: {loss_on: last-turn}` for true; for false leave it out",
            "22: neat_packing: unknown key — here it is data.packing",
            "23: flash_attn: unknown key — here it is model.attention",
            "24: val_size: unknown key — here it is data.eval",
            "25: eval_strategy: unknown key — write training.eval_every in steps, null for none",
            "26: resume_from_checkpoint: unknown key — start with `lora train RECIPE --resume`",
        ],
    ),
    Bad(
        "torchtune",
        after_good("""\
tokenizer:
  path: /tmp/tokenizer.model
lr_scheduler:
  num_warmup_steps: 100
max_steps_per_epoch: null
log_every_n_steps: 1
enable_activation_checkpointing: true
"""),
        [
            "3: tokenizer: unknown key — leave it out: it is the model's own",
            "5: lr_scheduler: unknown key — here it is training.schedule",
            "7: max_steps_per_epoch: unknown key — write training.max_steps instead of training.epochs",
            "8: log_every_n_steps: unknown key — here it is training.log_every",
            "9: enable_activation_checkpointing: unknown key — here it is training.gradient_checkpointing",
        ],
    ),
    Bad(
        "torchtune's model",
        """\
model:
  path: m
  lora_attn_modules: [q_proj]
  lora_rank: 8
  apply_lora_to_mlp: true
data: {train: rows.jsonl, packed: true}
""",
        [
            "3: model.lora_attn_modules: unknown key — here it is adapter.target_modules",
            "4: model.lora_rank: unknown key — here it is adapter.rank",
            "5: model.apply_lora_to_mlp: unknown key — name the layers in adapter.target_modules; all-linear, the default, has them",
            "6: data.packed: unknown key — here it is data.packing",
        ],
    ),
    Bad(
        "TRL and transformers",
        after_good("""\
training:
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  num_train_epochs: 3
  lr: 1e-4
  optim: adamw_torch
  adam_beta2: 0.95
  logging_steps: 10
  save_steps: 100
  eval_steps: 100
  save_total_limit: 2
  report_to: none
  max_seq_length: 512
  assistant_only_loss: true
  neftune_noise_alpha: 5
"""),
        [
            "4: training.per_device_train_batch_size: unknown key — here it is training.tokens_per_batch, or training.batch_size with `packing: false`",
            "5: training.gradient_accumulation_steps: unknown key — here it is training.gradient_accumulation",
            "6: training.num_train_epochs: unknown key — here it is training.epochs",
            "7: training.lr: unknown key — here it is training.learning_rate",
            "8: training.optim: unknown key — here it is training.optimizer",
            "9: training.adam_beta2: unknown key — leave it out: AdamW's betas are 0.9 and 0.999, its epsilon 1e-8",
            "10: training.logging_steps: unknown key — here it is training.log_every",
            "11: training.save_steps: unknown key — here it is training.save_every",
            "12: training.eval_steps: unknown key — here it is training.eval_every",
            "13: training.save_total_limit: unknown key — here it is training.keep_checkpoints",
            "14: training.report_to: unknown key — leave it out: metrics.jsonl in the run folder has every step",
            "15: training.max_seq_length: unknown key — here it is data.max_length",
            "16: training.assistant_only_loss: unknown key — leave it out for true; write `data: {loss_on: all}` for false",
            "17: training.neftune_noise_alpha: unknown key — leave it out: there is no such thing here",
        ],
    ),
    Bad(
        "PEFT",
        after_good("""\
adapter:
  r: 8
  lora_alpha: 16
  modules_to_save: [lm_head]
  use_dora: true
  use_rslora: false
  task_type: CAUSAL_LM
  layers_to_transform: [0, 1]
"""),
        [
            "4: adapter.r: unknown key — here it is adapter.rank",
            "5: adapter.lora_alpha: unknown key — here it is adapter.alpha",
            "6: adapter.modules_to_save: unknown key — leave it out: only adapters are trained, no whole module",
            "7: adapter.use_dora: unknown key — write `adapter: {method: dora}`",
            "8: adapter.use_rslora: unknown key — write `adapter: {method: rslora}`",
            "9: adapter.task_type: unknown key — here it is task",
            "10: adapter.layers_to_transform: unknown key — choose layers by a regex in adapter.target_modules; rank and alpha are the same in each",
        ],
    ),
    Bad(
        "unsloth",
        """\
model_name: unsloth/m
max_seq_length: 2048
load_in_4bit: true
use_gradient_checkpointing: unsloth
random_state: 3407
""",
        [
            "1: model_name: unknown key — here it is model.path",
            "2: max_seq_length: unknown key — here it is data.max_length",
            "3: load_in_4bit: unknown key — write `quantization: {bits: 4}`",
            "4: use_gradient_checkpointing: unknown key — here it is training.gradient_checkpointing",
            "5: random_state: unknown key — here it is training.seed",
        ],
    ),
    Bad(
        "bitsandbytes",
        after_good(
            "quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: bfloat16}\n"
        ),
        [
            "3: quantization.load_in_4bit: unknown key — write `quantization: {bits: 4}`",
            "3: quantization.bnb_4bit_quant_type: unknown key — here it is quantization.type",
            "3: quantization.bnb_4bit_use_double_quant: unknown key — here it is quantization.double_quant",
            "3: quantization.bnb_4bit_compute_dtype: unknown key — here it is quantization.compute_dtype",
        ],
    ),
    Bad(
        "a source of axolotl",
        """\
model: {path: m}
data:
  train:
    - {path: rows.jsonl, type: alpaca}
""",
        ["4: data.train[0].type: unknown key — here it is format"],
    ),
    Bad(
        "schema as a key",
        """\
$schema: recipe.json
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["1: $schema: unknown key — name it in a comment on the first line: `# yaml-language-server: $schema=PATH`"],
    ),
    Bad(
        "a secret",
        after_good("hf_token: hf_abc\n"),
        ["3: hf_token: unknown key — set HF_TOKEN in the environment: a recipe is no place for secrets"],
    ),
    # One value where a section is due, and the other way round.
    Bad(
        "words for sections",
        """\
model: org/model
data: rows.jsonl
adapter: lora
quantization: 4bit
training: fast
""",
        [
            "1: model: org/model where a section is due — write {path: org/model}",
            "2: data: rows.jsonl where a section is due — write {train: rows.jsonl}",
            "3: adapter: lora where a section is due — write {method: lora}",
            "4: quantization: 4bit where a section is due — write {bits: 4}, or leave the section out for none",
            "5: training: fast where a section is due — its keys are epochs, max_steps, tokens_per_batch, ...",
        ],
    ),
    Bad(
        "bits for quantization",
        after_good("quantization: 8\n"),
        ["3: quantization: 8 where a section is due — write {bits: 8}, or leave the section out for none"],
    ),
    Bad(
        "true for quantization",
        after_good("quantization: true\n"),
        ["3: quantization: true where a section is due — write {bits: 4}, or leave the section out for none"],
    ),
    Bad(
        "qlora",
        after_good("adapter: qlora\n"),
        ["3: adapter: qlora where a section is due — write `adapter: {method: lora}` and `quantization: {bits: 4}`"],
    ),
    Bad(
        "a list for a section",
        after_good("training: [epochs, 3]\n"),
        [
            "3: training: a list where a section is due — a section with the keys epochs, max_steps, tokens_per_batch, batch_size, gradient_accumulation, learning_rate, schedule, warmup, optimizer, weight_decay, max_grad_norm, gradient_checkpointing, seed, eval_every, save_every, keep_checkpoints and log_every"
        ],
    ),
    Bad(
        "null for a section",
        after_good("training: null\n"),
        ["3: training: null where a section is due — its keys are epochs, max_steps, tokens_per_batch, ..."],
    ),
    Bad(
        "a section for a value",
        after_good("training: {epochs: {max: 3}}\n"),
        ["3: training.epochs: a section where a value is due — a number above 0 or null"],
    ),
    Bad(
        "a section for a source",
        """\
model: {path: m}
data: {train: {path: a.jsonl}}
""",
        ["2: data.train: a section where a value is due — write it in a list: [{path: ...}]"],
    ),
    Bad(
        "words for sources",
        """\
model: {path: m}
data: {train: [a.jsonl, b.jsonl]}
""",
        [
            "2: data.train[0]: a.jsonl where a section is due — write {path: a.jsonl}",
            "2: data.train[1]: b.jsonl where a section is due — write {path: b.jsonl}",
        ],
    ),
    Bad(
        "a word for columns",
        """\
model: {path: m}
data: {train: a.jsonl, columns: question}
""",
        ["2: data.columns: 'question' is not pairs of texts — pairs of texts"],
    ),
    Bad(
        "a list for a number",
        after_good("adapter: {rank: [8, 16]}\n"),
        ["3: adapter.rank: a list where one value is due — a whole number, at least 1"],
    ),
    # Numbers.
    Bad("rank 0", after_good("adapter: {rank: 0}\n"), ["3: adapter.rank: 0 is too small — a whole number, at least 1"]),
    Bad(
        "rank with a half",
        after_good("adapter: {rank: 8.5}\n"),
        ["3: adapter.rank: 8.5 is not a whole number — a whole number, at least 1"],
    ),
    Bad(
        "rank in words",
        after_good("adapter: {rank: eight}\n"),
        ["3: adapter.rank: 'eight' is not a whole number — a whole number, at least 1"],
    ),
    Bad("rank in quotes", after_good('adapter: {rank: "8"}\n'), ["3: adapter.rank: '8' is text — remove the quotes"]),
    Bad(
        "negative alpha",
        after_good("adapter: {alpha: -16}\n"),
        ["3: adapter.alpha: -16 is too small — a number above 0"],
    ),
    Bad(
        "dropout of all",
        after_good("adapter: {dropout: 1}\n"),
        ["3: adapter.dropout: 1 is too large — a number, at least 0 and below 1"],
    ),
    Bad(
        "dropout in percent",
        after_good("adapter: {dropout: 5%}\n"),
        ["3: adapter.dropout: '5%' is not a number — did you mean 0.05? (a number, at least 0 and below 1)"],
    ),
    Bad(
        "rate 0",
        after_good("training: {learning_rate: 0}\n"),
        ["3: training.learning_rate: 0 is too small — a number above 0 and at most 10"],
    ),
    Bad(
        "rate too high",
        after_good("training: {learning_rate: 20}\n"),
        ["3: training.learning_rate: 20 is too large — a number above 0 and at most 10"],
    ),
    Bad(
        "rate not a number",
        after_good("training: {learning_rate: .nan}\n"),
        ["3: training.learning_rate: .nan is not finite — a number above 0 and at most 10"],
    ),
    Bad(
        "rate infinite",
        after_good("training: {learning_rate: -.inf}\n"),
        ["3: training.learning_rate: -.inf is not finite — a number above 0 and at most 10"],
    ),
    Bad(
        "rate past all floats",
        after_good("training: {learning_rate: 1e999}\n"),
        ["3: training.learning_rate: 1e999 is not finite — a number above 0 and at most 10"],
    ),
    Bad(
        "rate false",
        after_good("training: {learning_rate: no}\n"),
        ["3: training.learning_rate: 'no' is not a number above 0 and at most 10 — a number above 0 and at most 10"],
    ),
    Bad(
        "rate a boolean",
        after_good("training: {learning_rate: true}\n"),
        ["3: training.learning_rate: true does not fit — a number above 0 and at most 10"],
    ),
    Bad(
        "rate with two points",
        after_good("training: {learning_rate: 1.0.0}\n"),
        ["3: training.learning_rate: '1.0.0' is not a number above 0 and at most 10 — a number above 0 and at most 10"],
    ),
    Bad(
        "leading zero",
        after_good("training: {max_steps: 010}\n"),
        ["3: training.max_steps: '010' is not a whole number — did you mean 10? (a whole number, at least 1, or null)"],
    ),
    Bad(
        "base 60",
        after_good("training: {max_steps: 1:30}\n"),
        ["3: training.max_steps: '1:30' is not a whole number — a whole number, at least 1, or null"],
    ),
    Bad(
        "hexadecimal",
        after_good("training: {seed: 0x1F}\n"),
        [
            "3: training.seed: '0x1F' is not a whole number — did you mean 31? (a whole number, at least 0 and at most 4294967295)"
        ],
    ),
    Bad(
        "octal",
        after_good("training: {seed: 0o17}\n"),
        [
            "3: training.seed: '0o17' is not a whole number — did you mean 15? (a whole number, at least 0 and at most 4294967295)"
        ],
    ),
    Bad(
        "underscore",
        after_good("training: {max_steps: 1_000}\n"),
        [
            "3: training.max_steps: '1_000' is not a whole number — did you mean 1000? (a whole number, at least 1, or null)"
        ],
    ),
    Bad(
        "thousands comma",
        after_good('training: {max_steps: "1,000"}\n'),
        [
            "3: training.max_steps: '1,000' is not a whole number — did you mean 1000? (a whole number, at least 1, or null)"
        ],
    ),
    Bad(
        "a date",
        after_good("training: {max_steps: 2024-01-01}\n"),
        ["3: training.max_steps: '2024-01-01' is not a whole number — a whole number, at least 1, or null"],
    ),
    Bad(
        "very many digits",
        after_good("training: {max_steps: 999999999999999999999999999999999999999999999999999999999999}\n"),
        [
            "3: training.max_steps: '999999999999999999999999999999999999999999999999999999999999' is not a whole number — a whole number, at least 1, or null"
        ],
    ),
    Bad(
        "negative seed",
        after_good("training: {seed: -1}\n"),
        ["3: training.seed: -1 is too small — a whole number, at least 0 and at most 4294967295"],
    ),
    Bad(
        "seed too large",
        after_good("training: {seed: 4294967296}\n"),
        ["3: training.seed: 4294967296 is too large — a whole number, at least 0 and at most 4294967295"],
    ),
    Bad(
        "norm 0",
        after_good("training: {max_grad_norm: 0}\n"),
        ["3: training.max_grad_norm: 0 is too small — a number above 0 or null"],
    ),
    Bad(
        "None as a number",
        after_good("training: {max_grad_norm: None}\n"),
        ["3: training.max_grad_norm: 'None' is a word — write null for none"],
    ),
    Bad(
        "never evaluate by 0",
        after_good("training: {eval_every: 0}\n"),
        ["3: training.eval_every: 0 is too small — a whole number, at least 1, or null"],
    ),
    Bad(
        "epochs 0",
        after_good("training: {epochs: 0}\n"),
        ["3: training.epochs: 0 is too small — a number above 0 or null"],
    ),
    Bad(
        "eval 0",
        """\
model: {path: m}
data: {train: a.jsonl, eval: 0}
""",
        ["2: data.eval: 0 is too small — a number above 0 and below 1, or null"],
    ),
    Bad(
        "eval as rows",
        """\
model: {path: m}
data: {train: a.jsonl, eval: 200}
""",
        ["2: data.eval: 200 is too large — a number above 0 and below 1, or null"],
    ),
    Bad(
        "max_loss above all",
        """\
model: {path: m}
data: {train: a.jsonl, overlong: drop, max_loss: 5}
""",
        ["2: data.max_loss: 5 is too large — a number, at least 0 and at most 1, or null"],
    ),
    Bad(
        "weight 0",
        """\
model: {path: m}
data: {train: [{path: a.jsonl, weight: 0}]}
""",
        ["2: data.train[0].weight: 0 is too small — a number above 0 and at most 1000"],
    ),
    Bad(
        "processes 0",
        after_good("distributed: {processes: 0}\n"),
        ["3: distributed.processes: 0 is too small — a whole number, at least 1"],
    ),
    # Words and switches.
    Bad(
        "schedule misspelt",
        after_good("training: {schedule: cosin}\n"),
        ["3: training.schedule: 'cosin' is not constant, linear or cosine — did you mean cosine?"],
    ),
    Bad(
        "schedule of transformers",
        after_good("training: {schedule: constant_with_warmup}\n"),
        ["3: training.schedule: 'constant_with_warmup' is not constant, linear or cosine — did you mean constant?"],
    ),
    Bad(
        "optimizer of transformers",
        after_good("training: {optimizer: adamw_torch}\n"),
        ["3: training.optimizer: 'adamw_torch' is not adamw — did you mean adamw?"],
    ),
    Bad(
        "optimizer unknown",
        after_good("training: {optimizer: sgd}\n"),
        ["3: training.optimizer: 'sgd' is not adamw — write adamw"],
    ),
    Bad(
        "dtype short",
        """\
model: {path: m, dtype: bf16}
data: {train: a.jsonl}
""",
        ["1: model.dtype: 'bf16' is not auto, bfloat16, float16 or float32 — did you mean bfloat16?"],
    ),
    Bad(
        "dtype of torch",
        """\
model: {path: m, dtype: torch.float16}
data: {train: a.jsonl}
""",
        ["1: model.dtype: 'torch.float16' is not auto, bfloat16, float16 or float32 — did you mean float16?"],
    ),
    Bad(
        "method qlora",
        after_good("adapter: {method: qlora}\n"),
        ["3: adapter.method: 'qlora' is not lora, rslora or dora — did you mean lora?"],
    ),
    Bad("task to come", after_good("task: seq-cls\n"), ["3: task: 'seq-cls' is not causal-lm — write causal-lm"]),
    Bad(
        "format",
        """\
model: {path: m}
data: {train: a.jsonl, format: chatml}
""",
        [
            "2: data.format: 'chatml' is not auto, messages, sharegpt, alpaca, prompt-completion, text or tokens — did you mean messages?"
        ],
    ),
    Bad("bits 5", after_good("quantization: {bits: 5}\n"), ["3: quantization.bits: 5 is not a whole number — 4 or 8"]),
    Bad(
        "bits in quotes",
        after_good('quantization: {bits: "4"}\n'),
        ["3: quantization.bits: '4' is text — remove the quotes"],
    ),
    Bad(
        "overlong",
        """\
model: {path: m}
data: {train: a.jsonl, overlong: truncation}
""",
        ["2: data.overlong: 'truncation' is not error, drop or truncate — did you mean truncate?"],
    ),
    Bad(
        "switch maybe",
        """\
model: {path: m}
data: {train: a.jsonl, packing: maybe}
""",
        ["2: data.packing: 'maybe' is not true or false — write one of these"],
    ),
    Bad(
        "switch 1",
        """\
model: {path: m, trust_remote_code: 1}
data: {train: a.jsonl}
""",
        ["1: model.trust_remote_code: 1 does not fit — true or false"],
    ),
    Bad(
        "switch in quotes",
        """\
model: {path: m}
data: {train: a.jsonl, packing: "true"}
""",
        ["2: data.packing: 'true' is text — remove the quotes"],
    ),
    Bad(
        "checkpointing",
        after_good("training: {gradient_checkpointing: unsloth}\n"),
        ["3: training.gradient_checkpointing: 'unsloth' is not auto, true or false — write one of these"],
    ),
    Bad(
        "processes",
        after_good("distributed: {processes: all}\n"),
        ["3: distributed.processes: 'all' is not auto, or a whole number, at least 1 — write one of these"],
    ),
    Bad(
        "bias null",
        after_good("adapter: {bias: null}\n"),
        ["3: adapter.bias: null does not fit — none, all or lora_only"],
    ),
    # Text.
    Bad(
        "commit of digits",
        """\
model: {path: m, revision: 1234567}
data: {train: a.jsonl}
""",
        ['1: model.revision: 1234567 reads as a number, and text is due — put it in quotes: "1234567"'],
    ),
    Bad(
        "commit like a float",
        """\
model: {path: m, revision: 1e5}
data: {train: a.jsonl}
""",
        ['1: model.revision: 1e5 reads as a number, and text is due — put it in quotes: "1e5"'],
    ),
    Bad(
        "path true",
        """\
model: {path: true}
data: {train: a.jsonl}
""",
        ['1: model.path: true reads as true or false, and text is due — put it in quotes: "true"'],
    ),
    Bad(
        "path null",
        """\
model: {path: null}
data: {train: a.jsonl}
""",
        ["1: model.path: null does not fit — text"],
    ),
    Bad(
        "path empty",
        """\
model: {path: ""}
data: {train: a.jsonl}
""",
        ["1: model.path: an empty text — text"],
    ),
    Bad(
        "train a number",
        """\
model: {path: m}
data: {train: 5}
""",
        ['2: data.train: 5 reads as a number, and text is due — put it in quotes: "5"'],
    ),
    Bad(
        "column a number",
        """\
model: {path: m}
data: {train: a.jsonl, columns: {prompt: 3}}
""",
        ['2: data.columns.prompt: 3 reads as a number, and text is due — put it in quotes: "3"'],
    ),
    Bad(
        "module a number",
        after_good("adapter: {target_modules: [q_proj, 3]}\n"),
        ['3: adapter.target_modules[1]: 3 reads as a number, and text is due — put it in quotes: "3"'],
    ),
    Bad(
        "revision None",
        """\
model: {path: m, revision: None}
data: {train: a.jsonl}
""",
        ["1: model.revision: 'None' is read as a branch — write null for none"],
    ),
    Bad("output a list", after_good("output: [a, b]\n"), ["3: output: a list where one value is due — text"]),
    # Fields that do not go together.
    Bad(
        "epochs and steps",
        after_good("training: {epochs: 1, max_steps: 100}\n"),
        ["3: training.max_steps: epochs and max_steps are both set — keep one"],
    ),
    Bad(
        "tokens without packing",
        """\
model: {path: m}
data: {train: a.jsonl, packing: off}
training: {tokens_per_batch: 4096}
""",
        ["3: training.tokens_per_batch: has no effect without packing — write batch_size, or packing: true"],
    ),
    Bad(
        "rows with packing",
        after_good("training: {batch_size: 4}\n"),
        ["3: training.batch_size: has no effect with packing — write tokens_per_batch, or `data: {packing: false}`"],
    ),
    Bad(
        "batch below a row",
        """\
model: {path: m}
data: {train: a.jsonl, max_length: 2048}
training: {tokens_per_batch: 1024}
""",
        [
            "3: training.tokens_per_batch: 1024 is less than data.max_length, 2048 — a batch has to hold the longest row: raise it, or lower data.max_length"
        ],
    ),
    Bad(
        "8 bits of a 4-bit type",
        after_good("quantization: {bits: 8, type: nf4, double_quant: false}\n"),
        [
            "3: quantization.type: has no effect with 8 bits — remove it, or write bits: 4",
            "3: quantization.double_quant: has no effect with 8 bits — remove it, or write bits: 4",
        ],
    ),
    Bad(
        "warmup of steps and a half",
        after_good("training: {warmup: 10.5}\n"),
        ["3: training.warmup: 10.5 is neither a fraction below 1 nor a whole number of steps — write 10 for steps"],
    ),
    Bad(
        "warmup longer than training",
        after_good("training: {warmup: 100, max_steps: 50}\n"),
        ["3: training.warmup: 100 steps of warmup do not fit into 50 steps — write fewer, or a fraction such as 0.03"],
    ),
    Bad(
        "no modules",
        after_good("adapter: {target_modules: []}\n"),
        ["3: adapter.target_modules: an empty list adapts no layer — name modules, or write all-linear"],
    ),
    Bad(
        "module twice",
        after_good("adapter: {target_modules: [q_proj, v_proj, q_proj]}\n"),
        ["3: adapter.target_modules[2]: 'q_proj' is listed twice — keep one"],
    ),
    Bad(
        "all in a list",
        after_good("adapter: {target_modules: [all-linear]}\n"),
        [
            "3: adapter.target_modules[0]: 'all-linear' in a list is a module of that name — write target_modules: all-linear, without the list"
        ],
    ),
    Bad(
        "all of LLaMA-Factory",
        after_good("adapter: {target_modules: all}\n"),
        ["3: adapter.target_modules: 'all' names no module — did you mean all-linear?"],
    ),
    Bad(
        "all with underscore",
        after_good("adapter: {target_modules: all_linear}\n"),
        ["3: adapter.target_modules: 'all_linear' names no module — did you mean all-linear?"],
    ),
    Bad(
        "one module as a word",
        after_good("adapter: {target_modules: q_proj}\n"),
        ["3: adapter.target_modules: 'q_proj' is a regex over full names, and matches none — write a list: [q_proj]"],
    ),
    Bad(
        "modules with commas",
        after_good('adapter: {target_modules: "q_proj,v_proj"}\n'),
        [
            "3: adapter.target_modules: 'q_proj,v_proj' is a regex over full names, and matches none — write a list: [q_proj, v_proj]"
        ],
    ),
    Bad(
        "broken regex",
        after_good('adapter: {target_modules: ".*(q_proj"}\n'),
        [
            "3: adapter.target_modules: '.*(q_proj' is no regex (missing ), unterminated subpattern at position 2) — mend it, or write a list of names"
        ],
    ),
    Bad(
        "empty module",
        after_good('adapter: {target_modules: [""]}\n'),
        ["3: adapter.target_modules[0]: an empty name — remove it"],
    ),
    Bad(
        "no module word",
        after_good('adapter: {target_modules: ""}\n'),
        ["3: adapter.target_modules: an empty text names no module — name modules, or write all-linear"],
    ),
    Bad(
        "loss without a policy",
        """\
model: {path: m}
data: {train: a.jsonl, max_loss: 0.1}
""",
        [
            "2: data.max_loss: has no effect where the first lost row stops the run — write overlong: drop or on_bad_row: skip, or remove it"
        ],
    ),
    Bad(
        "no sources",
        """\
model: {path: m}
data: {train: [], eval: []}
""",
        [
            "2: data.train: an empty list of sources — name a path",
            "2: data.eval: an empty list of sources — name a path, or write null for none",
        ],
    ),
    Bad(
        "source twice",
        """\
model: {path: m}
data:
  train:
    - path: a.jsonl
    - path: b.jsonl
    - path: a.jsonl
""",
        [
            "6: data.train[2]: 'a.jsonl' is listed twice — remove it; to see rows more often, raise the weight of the first"
        ],
    ),
    Bad(
        "evaluated on training rows",
        """\
model: {path: m}
data: {train: ./a.jsonl, eval: a.jsonl}
""",
        ["2: data.eval: 'a.jsonl' is trained on too — name other rows, or hold a fraction out: 0.05"],
    ),
    Bad(
        "one split for both",
        """\
model: {path: m}
data:
  train: [{path: org/rows, split: train}]
  eval: [{path: org/rows, split: train}]
""",
        ["4: data.eval: 'org/rows' is trained on too — name other rows, or hold a fraction out: 0.05"],
    ),
    Bad(
        "paths with a comma",
        """\
model: {path: m}
data: {train: "a.jsonl,b.jsonl"}
""",
        [
            "2: data.train: 'a.jsonl,b.jsonl' is one path with a comma in it — for several sources, write a list of {path: ...}"
        ],
    ),
    Bad(
        "eval no",
        """\
model: {path: m}
data: {train: a.jsonl, eval: no}
""",
        ["2: data.eval: 'no' is read as a path — write null for none"],
    ),
    Bad(
        "eval false",
        """\
model: {path: m}
data: {train: a.jsonl, eval: false}
""",
        ["2: data.eval: false is no choice — write null for none"],
    ),
    Bad(
        "template none",
        """\
model: {path: m}
data: {train: a.jsonl, chat_template: None}
""",
        ["2: data.chat_template: 'None' is read as a template — write null for the tokenizer's own"],
    ),
    Bad(
        "list among keys",
        after_good("""\
training:
  seed: 1
  - epochs
"""),
        ["5: the indentation fits no line above — indent it like its neighbours"],
    ),
    Bad(
        "eval in percent",
        """\
model: {path: m}
data: {train: a.jsonl, eval: 5%}
""",
        ["2: data.eval: '5%' is read as a path — write 0.05"],
    ),
    Bad(
        "eval in quotes",
        """\
model: {path: m}
data: {train: a.jsonl, eval: "0.05"}
""",
        ["2: data.eval: '0.05' is read as a path — remove the quotes"],
    ),
    Bad(
        "template for text",
        """\
model: {path: m}
data: {train: a.txt, format: text, chat_template: chatml}
""",
        ["2: data.chat_template: has no effect on rows of format text — remove it"],
    ),
    Bad(
        "turns of tokens",
        """\
model: {path: m}
data: {train: a.jsonl, format: tokens, loss_on: last-turn}
""",
        ["2: data.loss_on: has no effect on rows of format tokens — remove it: they have no turns"],
    ),
    Bad(
        "revision of a file",
        """\
model: {path: model.gguf, revision: main}
data: {train: a.jsonl}
""",
        ["1: model.revision: has no effect on a local model — remove it: only hub models have revisions"],
    ),
    Bad(
        "revision of a folder",
        """\
model: {path: ./model, revision: main}
data: {train: a.jsonl}
""",
        ["1: model.revision: has no effect on a local model — remove it: only hub models have revisions"],
    ),
    Bad(
        "code of a file",
        """\
model: {path: model.gguf, trust_remote_code: yes}
data: {train: a.jsonl}
""",
        ["1: model.trust_remote_code: has no effect on a .gguf file — remove it"],
    ),
    Bad(
        "attention short",
        """\
model: {path: m, attention: flash-attn}
data: {train: a.jsonl}
""",
        ["1: model.attention: 'flash-attn' is no name of transformers — did you mean flash_attention_2?"],
    ),
    Bad(
        "output over the model",
        """\
model: {path: ./model}
data: {train: a.jsonl}
output: model/
""",
        ["3: output: 'model/' is model.path too — name a folder of its own"],
    ),
    Bad(
        "output over the rows",
        """\
model: {path: m}
data: {train: rows, eval: 0.1}
output: rows
""",
        ["3: output: 'rows' is data.train too — name a folder of its own"],
    ),
    Bad(
        "output like a file",
        after_good("output: runs/adapter.safetensors\n"),
        ["3: output: 'runs/adapter.safetensors' is named like a file — name a folder"],
    ),
    Bad(
        "variable",
        after_good("output: $HOME/runs\n"),
        ["3: output: variables are not filled in — write it out, or use --set output=..."],
    ),
    Bad(
        "rules beside other problems",
        after_good("""\
training: {epochs: 1, max_steps: 5, seed: x, batch_size: 0}
adapter: {target_modules: [], rank: 0}
lora_r: 3
"""),
        [
            "3: training.batch_size: 0 is too small — a whole number, at least 1, or null",
            "3: training.seed: 'x' is not a whole number — a whole number, at least 0 and at most 4294967295",
            "3: training.max_steps: epochs and max_steps are both set — keep one",
            "4: adapter.rank: 0 is too small — a whole number, at least 1",
            "4: adapter.target_modules: an empty list adapts no layer — name modules, or write all-linear",
            "5: lora_r: unknown key — here it is adapter.rank",
        ],
    ),
    # `--set`.
    Bad(
        "no equals sign",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set training.seed: no `=` — write it as training.learning_rate=1e-4"],
        sets=["training.seed"],
    ),
    Bad(
        "no key",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set =3: '' is no key — write it as section.key, as in training.learning_rate; a list is set as a whole"],
        sets=["=3"],
    ),
    Bad(
        "no value",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set training.seed=: training.seed: has no value — write one, or remove the key"],
        sets=["training.seed="],
    ),
    Bad(
        "list index",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        [
            "--set data.train[0].path=x: 'data.train[0].path' is no key — write it as section.key, as in training.learning_rate; a list is set as a whole"
        ],
        sets=["data.train[0].path=x"],
    ),
    Bad(
        "empty step",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        [
            "--set training..seed=1: 'training..seed' is no key — write it as section.key, as in training.learning_rate; a list is set as a whole"
        ],
        sets=["training..seed=1"],
    ),
    Bad(
        "twice",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set adapter.rank=16: adapter.rank: set twice — keep one --set of it"],
        sets=["adapter.rank=8", "adapter.rank=16"],
    ),
    Bad(
        "below a value",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        [
            "--set data.train.path=x: data.train.path: data.train is a single value, not a section — set it as a whole: --set data.train=..."
        ],
        sets=["data.train.path=x"],
    ),
    Bad(
        "out of range",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set adapter.rank=0: adapter.rank: 0 is too small — a whole number, at least 1"],
        sets=["adapter.rank=0"],
    ),
    Bad(
        "foreign",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set lora_r=8: lora_r: unknown key — here it is adapter.rank"],
        sets=["lora_r=8"],
    ),
    Bad(
        "foreign in a section",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        [
            "--set training.micro_batch_size=8: training.micro_batch_size: unknown key — here it is training.tokens_per_batch, or training.batch_size with `packing: false`"
        ],
        sets=["training.micro_batch_size=8"],
    ),
    Bad(
        "not YAML",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set output=[a: output: a `[` is not closed — close it, with commas between the values"],
        sets=["output=[a"],
    ),
    Bad(
        "in conflict with the file",
        after_good("""\
training:
  epochs: 2
"""),
        ["--set training.max_steps=5: training.max_steps: epochs and max_steps are both set — keep one"],
        sets=["training.max_steps=5"],
    ),
    Bad(
        "key twice in a value",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        ["--set data.columns={a: b, a: c}: data.columns.a: written twice — keep one"],
        sets=["data.columns={a: b, a: c}"],
    ),
    Bad(
        "several",
        """\
model: {path: org/model}
data: {train: rows.jsonl}
""",
        [
            "--set training.seed=x: training.seed: 'x' is not a whole number — a whole number, at least 0 and at most 4294967295",
            "--set adapter.rnak=3: adapter.rnak: unknown key — did you mean rank?",
        ],
        sets=["training.seed=x", "adapter.rnak=3"],
    ),
]
