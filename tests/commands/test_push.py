"""`lora push` against a hub on localhost: what goes, what is refused, what arrives, and errors in one line each."""

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lora_cli.setup import publishable
from lora_cli.setup.publishable import find_publishable
from tests.commands.conftest import Lora, remove_checksums
from tests.support.stub_hub import Refusal, StubHub, git_blob_sha1

REPOSITORY = "me/adapter"
HF_TOKEN = "hf_" + "a1B2" * 8 + "c3"
NO_ADAPTER = "note: adapter_config.json names the base base, which is no hub id"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def uploaded(hub: StubHub, name: str = REPOSITORY) -> dict[str, bytes]:
    files = hub.repositories[name].files
    return {path: file.data or b"" for path, file in files.items() if path != ".gitattributes"}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.slow
def test_a_run_is_pushed_once_and_its_adapter_arrives(trained_run: Path, lora: Lora, hub: StubHub):
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 0, result.err
    assert uploaded(hub) == contents(trained_run / "adapter")
    first, *_, verified, last = result.out.splitlines()
    assert first == f"adapter runs/a/adapter to {REPOSITORY}:"
    assert "  adapter_model.safetensors     35 KiB" in result.out
    assert verified == "verified: the hub has the contents of all 8 files, by their SHA-256 or git's id"
    assert last == f"{hub.address}/{REPOSITORY} (public), commit {hub.repositories[REPOSITORY].head}"
    assert NO_ADAPTER in result.err
    assert f"created {REPOSITORY} (public)" in result.err
    assert "Traceback" not in result.err
    before = list(hub.requests)
    again = lora("push", trained_run, REPOSITORY)
    assert again.code == 0
    assert "the hub has all 8 files already, with the same contents: nothing was uploaded" in again.out
    assert not [each for each in hub.requests[len(before) :] if each.startswith(("POST", "PUT"))]


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_the_hub_stores_with_another_byte_is_found(
    damaged: str, trained_run: Path, lora: Lora, hub: StubHub
):
    hub.damage = damaged
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 1
    assert result.last_two[0] == (
        f"error: {REPOSITORY} does not have the files of this machine: {damaged} has other contents there than here"
    )
    assert "verified" not in result.out


@pytest.mark.slow
def test_a_file_in_several_parts_arrives(trained_run: Path, lora: Lora, hub: StubHub):
    hub.part_bytes = 10_000
    result = lora("push", trained_run, REPOSITORY, "--private")
    assert result.code == 0, result.err
    assert hub.repositories[REPOSITORY].private
    assert "(private), commit" in result.out
    assert hub.count(r"PUT /lfs/\w+/\d") == 4 + 2  # of adapter and tokenizer
    assert uploaded(hub) == contents(trained_run / "adapter")


@pytest.mark.slow
def test_the_storage_that_the_client_uses_by_default(
    trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.break_at = lambda request: Refusal(403, "no") if "/v1/xorbs/" in request else None
    refused = lora("push", trained_run, REPOSITORY)
    assert refused.code == 1
    assert refused.last_two[0].startswith(f"error: {REPOSITORY}: the upload failed: "), refused.err
    assert refused.last_two[1] == "hint: your token is of me (organizations: my-org)"
    hub.break_at = lambda request: None
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 0, result.err
    assert "verified: the hub has the contents of all 8 files" in result.out
    assert hub.blocks
    assert hub.count("/lfs/") == 0
    hub.repositories.clear()
    hub.damage = "adapter_model.safetensors"
    assert "adapter_model.safetensors has other contents" in lora("push", trained_run, REPOSITORY).err


@pytest.mark.slow
def test_an_interrupted_upload_is_repeated_without_the_files_that_arrived(trained_run: Path, lora: Lora, hub: StubHub):
    hub.break_at = lambda request: Refusal(500, "overloaded") if "/commit/" in request else None
    failed = lora("push", trained_run, REPOSITORY)
    assert failed.code == 1
    assert failed.last_two == [
        f"error: {REPOSITORY}: the hub answered with status 500: overloaded",
        "hint: run the command again: what has arrived is not uploaded twice",
    ]
    assert uploaded(hub) == {}
    sent = hub.count("PUT /lfs/")
    hub.break_at = lambda request: None
    assert lora("push", trained_run, REPOSITORY).code == 0
    assert (sent, hub.count("PUT /lfs/")) == (2, 2)
    assert uploaded(hub) == contents(trained_run / "adapter")


@pytest.mark.slow
def test_other_files_of_the_repository_are_shown_and_never_deleted(trained_run: Path, lora: Lora, hub: StubHub):
    hub.add(REPOSITORY, {"README.md": b"mine", "model.safetensors": b"m" * 20_000, ".gitattributes": b""})
    refused = lora("push", trained_run, REPOSITORY)
    assert refused.code == 2
    assert refused.err.splitlines()[-4:] == [
        "would be replaced: README.md",
        "would stay beside the new files: model.safetensors",
        f"error: {REPOSITORY} has other files already",
        "hint: give another name; or --force, which replaces the files of the same name, and deletes none",
    ]
    assert uploaded(hub)["README.md"] == b"mine"
    forced = lora("push", trained_run, REPOSITORY, "--force")
    assert forced.code == 0, forced.err
    assert "--force: replaced: README.md" in forced.err
    assert "--force: stay beside the new files: model.safetensors" in forced.err
    assert uploaded(hub) == {**contents(trained_run / "adapter"), "model.safetensors": b"m" * 20_000}


@pytest.mark.slow
def test_a_change_of_somebody_else_meanwhile_is_not_overwritten(trained_run: Path, lora: Lora, hub: StubHub):
    repository = hub.add(REPOSITORY, {".gitattributes": b""})

    def change(request: str) -> None:
        if "/preupload/" in request:
            repository.commit({**repository.files, "README.md": hub.store("README.md", b"theirs")})

    hub.break_at = change
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 1
    assert result.last_two[0].startswith(f"error: {REPOSITORY} was changed by somebody else meanwhile (412)")
    assert uploaded(hub) == {"README.md": b"theirs"}


@pytest.mark.slow
def test_a_private_upload_never_goes_to_a_public_repository(trained_run: Path, lora: Lora, hub: StubHub):
    hub.add(REPOSITORY, {".gitattributes": b""})
    result = lora("push", trained_run, REPOSITORY, "--private")
    assert result.last_two[0] == (
        f"error: {REPOSITORY} is public: --private is for a repository that does not exist yet"
    )
    assert uploaded(hub) == {}


@pytest.mark.slow
def test_a_dry_run_uploads_nothing(trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch):
    result = lora("push", trained_run, REPOSITORY, "--dry-run", "--private")
    assert result.code == 0
    assert result.out.splitlines()[-1] == (
        f"dry run: nothing was uploaded; {REPOSITORY} would be created (private); files: 8 new"
    )
    assert not [each for each in hub.requests if not each.startswith(("GET", "HEAD"))]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no/such/file")
    without = lora("push", trained_run, REPOSITORY, "--dry-run")
    assert without.code == 0
    assert without.out.splitlines()[-1] == (
        "dry run: nothing was uploaded, and the hub was not asked: there is no token of the hub on this machine"
    )


def test_a_folder_that_is_no_result_is_not_searched(workdir: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    """As of a home folder, which would take minutes."""
    monkeypatch.setattr(publishable, "list_files", lambda folder: pytest.fail("searched"))
    Path("home/below").mkdir(parents=True)
    result = lora("push", "home", REPOSITORY, "--dry-run")
    assert result.last_two[0] == "error: home is no result of lora: it has no adapter, model or export"


@pytest.mark.slow
def test_json_is_the_only_output(trained_run: Path, lora: Lora, hub: StubHub):
    (trained_run / "adapter" / "optimizer.pt").write_bytes(b"state")
    value = json.loads(lora("push", trained_run, REPOSITORY, "--json").out)
    assert (value["uploaded"], value["private"], value["dry_run"]) == (True, False, False)
    assert value["commit"] == hub.repositories[REPOSITORY].head
    assert value["left_out"] == {"optimizer.pt": "state of a training run"}
    assert {each["state"] for each in value["files"]} == {"new"}
    assert value["bytes"] == sum(len(data) for data in uploaded(hub).values())
    again = json.loads(lora("push", trained_run, REPOSITORY, "--json").out)
    assert not again["uploaded"]
    assert {each["state"] for each in again["files"]} == {"unchanged"}


def test_names_that_the_hub_does_not_allow(lora: Lora):
    for name in ("adapter", "/adapter", "me/", "me/a/b", "https://huggingface.co/me/a", "me/a b", "me/.a", "me/a--b"):
        start = time.monotonic()
        result = lora("push", "nowhere", name)
        assert result.code == 2, name
        assert result.last_two[0].startswith(f"error: {name} is not the name of a repository"), result.err
        assert result.last_two[1].startswith("hint: write owner/name"), name
        assert time.monotonic() - start < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "repository", "message", "hint"),
    [
        ("hf_wrong", REPOSITORY, "the hub does not accept the token of this machine", "log in with `hf auth login`"),
        ("hf_reader", REPOSITORY, "the token of me (laptop) can only read", "log in with `hf auth login`"),
        (
            "hf_writer",
            "nobody/x",
            "nobody/x: the token may not write there (403): You don't have",
            "your token is of me",
        ),
    ],
)
def test_a_token_without_the_right(
    token: str,
    repository: str,
    message: str,
    hint: str,
    trained_run: Path,
    lora: Lora,
    hub: StubHub,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("HF_TOKEN", token)
    result = lora("push", trained_run, repository)
    assert result.code == 2
    assert result.last_two[0].startswith(f"error: {message}"), result.err
    assert result.last_two[1].startswith(f"hint: {hint}"), result.err
    assert hub.repositories == {}


def test_without_a_token_or_offline_nothing_is_read(
    trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        lora("push", trained_run, REPOSITORY).last_two[0] == "error: HF_HUB_OFFLINE is set, and an upload needs the hub"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no/such/file")
    result = lora("push", trained_run, REPOSITORY)
    assert result.last_two[0] == "error: there is no token of the hub on this machine"
    assert "hf auth login" in result.last_two[1]
    assert hub.requests == []


@pytest.mark.slow
def test_without_a_network_there_is_one_error_within_seconds(
    trained_run: Path, lora: Lora, hub: StubHub, monkeypatch: pytest.MonkeyPatch
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 2
    assert "the hub does not answer (asked twice)" in result.last_two[0]
    assert result.last_two[1] == "hint: check the network and HF_ENDPOINT"


LEAKS = {
    f"key: {HF_TOKEN}": "a token of Hugging Face (hf_a1B...)",
    "id AKIAIOSFODNN7EXAMPLE": "an access key of AWS (AKIAIO...)",
    "-----BEGIN RSA PRIVATE KEY-----": "a private key (-----B...)",
    "ghp_" + "x" * 36: "a token of GitHub (ghp_xx...)",
    "https://me:secret@example.org/x": "a URL with a password (https:...)",
    "see /home/anna/data/rows.jsonl": "a path of this machine, /home/anna/data/rows.jsonl",
    "  train: /data/rows.jsonl": "a path of this machine, /data/rows.jsonl",
    "C:\\Users\\anna\\rows": "a path of this machine, C:\\Users\\anna\\rows",
}


@pytest.mark.slow
def test_secrets_and_paths_in_texts_are_refused(trained_run: Path, lora: Lora, hub: StubHub):
    adapter = remove_checksums(trained_run / "adapter")
    (adapter / "README.md").write_text("\n".join(LEAKS))
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 2
    lines = [f"README.md, line {number}: {what}" for number, what in enumerate(LEAKS.values(), start=1)]
    assert sorted(result.err.splitlines()[-len(LEAKS) - 2 : -2]) == sorted(lines)
    assert result.last_two == [
        "error: runs/a/adapter is not published: 8 problems",
        "hint: remove the secret, and revoke it if anybody else could read the file; write a hub id or a file name in "
        "place of the path",
    ]
    assert hub.requests == []


@pytest.mark.slow
def test_a_path_in_the_configuration_is_refused_and_one_in_a_vocabulary_is_not(
    trained_run: Path, lora: Lora, hub: StubHub
):
    adapter = remove_checksums(trained_run / "adapter")
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["/home/anna/"] = tokenizer["model"]["vocab"].pop("a")
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/models/llama")
    result = lora("push", trained_run, REPOSITORY)
    assert result.err.splitlines()[-3:] == [
        "adapter_config.json, base_model_name_or_path: a path of this machine, /models/llama",
        "error: runs/a/adapter is not published: one problem",
        "hint: write the base's hub id: lora export runs/a/adapter --to peft --base ORG/NAME --out FOLDER",
    ]


@pytest.mark.slow
def test_texts_that_look_like_paths_or_secrets_are_published(trained_run: Path, lora: Lora, hub: StubHub):
    adapter = remove_checksums(trained_run / "adapter")
    (adapter / "README.md").write_text(
        "see https://example.org/home/page, user/name and a/b; the drive /mnt/data; sha256 " + "a1" * 32
    )
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_your_own_token_is_found_whatever_its_form(trained_run: Path, lora: Lora, hub: StubHub):
    adapter = remove_checksums(trained_run / "adapter")
    (adapter / "README.md").write_text("hf_writer")
    assert "README.md, line 1: your token of the hub" in lora("push", trained_run, REPOSITORY).err


@pytest.mark.slow
def test_a_changed_card_is_told_and_its_checksum_renewed(trained_run: Path, lora: Lora, hub: StubHub):
    adapter = trained_run / "adapter"
    (adapter / "README.md").write_text("# My adapter\n")
    (adapter / "LICENSE").write_text("MIT")
    result = lora("push", trained_run, REPOSITORY)
    assert result.code == 0, result.err
    assert "note: README.md was changed after the result was written" in result.err
    assert "note: LICENSE was added after the result was written" in result.err
    record = json.loads(uploaded(hub)["checksums.json"])["files"]
    assert record["README.md"]["bytes"] == len("# My adapter\n")
    assert record["LICENSE"]["bytes"] == 3
    Path("fetched").mkdir()
    for name, data in uploaded(hub).items():
        Path("fetched", name).write_bytes(data)
    from lora_cli.run.checksums import find_damage

    assert find_damage(Path("fetched")) == []
    assert find_damage(adapter) != [], "the file of this machine is left as it is"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flipped", "missing", "unknown", "link", "checkpoint", "unfinished", "nowhere"])
def test_what_is_no_whole_result_is_refused(kind: str, trained_run: Path, lora: Lora, hub: StubHub):
    adapter, target, line = trained_run / "adapter", trained_run, ""
    weights = adapter / "adapter_model.safetensors"
    if kind == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        line = "adapter_model.safetensors has other contents than when it was written"
    elif kind == "missing":
        (adapter / "tokenizer.json").unlink()
        line = "tokenizer.json is missing"
    elif kind == "unknown":
        (adapter / "notes.docx").write_bytes(b"x")
        line = "notes.docx is not known as a file of an adapter"
    elif kind == "link":
        weights.rename("elsewhere")
        weights.symlink_to(Path("elsewhere").absolute())
        line = "adapter_model.safetensors is a link, not a file"
    elif kind == "checkpoint":
        target = trained_run / "checkpoints" / "step-00000004"
        line = f"error: {target} is a checkpoint: it has the state of an optimizer too"
    elif kind == "unfinished":
        shutil.rmtree(adapter)
        line = "error: runs/a has no adapter: its training did not finish"
    else:
        target = Path("nowhere")
        line = "error: nowhere does not exist"
    result = lora("push", target, REPOSITORY)
    assert result.code == 2
    assert line in result.err.splitlines(), result.err
    assert hub.requests == []


@pytest.mark.slow
def test_a_model_is_pushed_and_one_without_all_shards_is_not(
    workdir: Path, tiny_folder: Path, lora: Lora, hub: StubHub
):
    shutil.copytree(tiny_folder, "merged")
    result = lora("push", "merged", "my-org/model")
    assert result.code == 0, result.err
    assert result.out.startswith("model merged to my-org/model:\n")
    assert uploaded(hub, "my-org/model") == contents(Path("merged"))
    Path("merged/model.safetensors").unlink()
    assert lora("push", "merged", "my-org/model").last_two[0].startswith("error: merged")


@pytest.mark.slow
def test_an_exported_file_is_pushed_with_its_verdict(workdir: Path, tiny_folder: Path, lora: Lora, hub: StubHub):
    assert lora("export", "base", "--to", "gguf", "--verify", "file", "--out", "m.gguf").code == 0
    result = lora("push", "m.gguf", "me/gguf")
    assert result.code == 0, result.err
    assert uploaded(hub, "me/gguf").keys() == {"m.gguf", "m.export.json"}
    file = Path("m.gguf")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "m.gguf is not the file that was exported and verified" in lora("push", "m.gguf", "me/gguf").err


def test_the_files_of_each_kind(tmp_path: Path):
    names = {
        "Ollama model": ["Modelfile", "model.gguf", "checksums.json", "export.json"],
        "ONNX model": ["model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"],
        "model": ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "modeling_x.py"],
        "GGUF model": ["model-q8_0.gguf", "README.md"],
    }
    others = {
        "training_args.bin": "state of a training run",
        "events.out.tfevents.1": "a log",
        ".DS_Store": "of another program",
    }
    others |= {
        "checkpoint-5/model.safetensors": "a checkpoint",
        "pytorch_model.bin": "pickle, which can run code when it is loaded",
    }
    for kind, files in names.items():
        folder = tmp_path / kind
        for name in (*files, *others):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"{}")
        (folder / "checksums.json").unlink(missing_ok=True)
        found = find_publishable(folder)
        assert (found.kind, found.names) == (kind, sorted(set(files) - {"checksums.json"}))
        assert found.left_out == others


def test_the_id_of_a_file_is_gits():
    assert git_blob_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
