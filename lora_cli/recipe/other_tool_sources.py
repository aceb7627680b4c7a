"""Keys that other tools have in a dataset source, and what to write in data.train and data.eval instead. No torch."""

# Another tool's key of a dataset source: the key in an item of data.train or data.eval.
RENAMED_IN_SOURCE: dict[str, str] = {
    "type": "format",
    "formatting": "format",
    "data_files": "path",
    "file_name": "path",
    "hf_hub_url": "path",
    "name": "subset",
    "config_name": "subset",
    "subset_name": "subset",
    "num_samples": "max_rows",
    "sep": "delimiter",
    "dataset": "path",
    "prob": "weight",
    "ratio": "weight",
    "repeat": "weight",
}

# Another tool's key of a dataset source, where no single key has the same value.
REPLACED_IN_SOURCE: dict[str, str] = {
    "ranking": "write rows with one good answer: preference training is another task",
    "ds_type": "remove it: the type of a file is read from its name",
    "chat_template": "write data.chat_template, which applies to every source",
    "field_system": "write `columns: {system: NAME}`",
    "field_instruction": "write `columns: {instruction: NAME}`",
    "field_input": "write `columns: {input: NAME}`",
    "field_output": "write `columns: {output: NAME}`",
    "field_tools": "write `columns: {tools: NAME}`",
    "tags": "write `message_fields: {role: NAME, content: NAME}`, and `roles: {NAME: user}` for other roles",
    "train_on_split": "write `split: NAME`",
}
