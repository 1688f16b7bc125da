"""Bring an adapter to a hub: the files that may go out, looked through before, in one commit.

Only files with a known name go out. One commit has them all, so an upload that is interrupted
leaves the repository as it was and can be done again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError

from grasp_lora.adapters.chat import TEMPLATE_FILE
from grasp_lora.adapters.folder import (
    ADAPTER_CONFIG_FILE,
    INDEX_FILE,
    NOTES_FILE,
    adapter_in,
    read_config_file,
    weights_files,
)
from grasp_lora.base.files import DONE_FILE, RESULT, check_run, damage_in, damage_words
from grasp_lora.base.words import shortened, shown, shown_path
from grasp_lora.config.sections import hub_id
from grasp_lora.report.card import CARD_FILE
from grasp_lora.sharing.private import found_in, notes_of_weights, without_paths

REPORTS = ("report.html", "report.md")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")
_OF_TOKENIZER = (
    *_VOCABULARY,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE),
)
_MESSAGE = "Upload an adapter with grasp-lora"


@dataclass(frozen=True)
class Parcel:
    """What goes out.

    Attributes:
        folder: the adapter folder.
        files: name -> the file, or its content where it is not that of a file.
        stays: names of files beside them that do not go out.
    """

    folder: Path
    files: Mapping[str, Path | bytes]
    stays: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Return name -> bytes."""
        return {
            name: len(one) if isinstance(one, bytes) else one.stat().st_size
            for name, one in self.files.items()
        }


@dataclass(frozen=True)
class Place:
    """Where it goes.

    Attributes:
        repo: id of the repository, owner/name.
        user: name of the user that is logged in.
        private: whether the repository is, or will be, private.
        there: names of the files in it; None if it does not exist yet.
    """

    repo: str
    user: str
    private: bool
    there: tuple[str, ...] | None


def parcel_of(given: Path) -> Parcel:
    """Return what goes out of an adapter folder, or of the folder of a finished run.

    Of a run these are its result and its reports, in which paths are cut to their last name.

    Raises:
        FileNotFoundError, ValueError: there is no adapter with a card, the run is not finished, or
            a file is damaged.
    """
    is_run = (given / DONE_FILE).is_file() and check_run(given)
    folder = _result_of(given) if is_run else adapter_in(given)
    read_config_file(folder)
    names = [ADAPTER_CONFIG_FILE, *(file.name for file in weights_files(folder))]
    _, wrong = damage_in(folder)
    if wrong:
        raise ValueError(f"{shown_path(folder)} is damaged: {damage_words(wrong)}; restore it")
    if not (folder / CARD_FILE).is_file():
        raise ValueError(
            f"{shown_path(folder)} has no card ({CARD_FILE}); grasp-lora export --to peft writes a "
            "copy with one, push that"
        )
    known = (INDEX_FILE, NOTES_FILE, CARD_FILE, *_OF_TOKENIZER)
    names += [name for name in known if (folder / name).is_file()]
    files: dict[str, Path | bytes] = {name: folder / name for name in dict.fromkeys(names)}
    if is_run:
        texts = {name: (given / name).read_text(encoding="utf-8") for name in REPORTS}
        files |= {name: without_paths(text).encode() for name, text in texts.items()}
    stays = sorted(one.name for one in folder.iterdir() if one.name not in files)
    return Parcel(folder, files, tuple(stays))


def _result_of(run: Path) -> Path:
    if not (run / RESULT / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"{shown_path(run / RESULT)} holds no adapter (the run ships a prompt); there is "
            "nothing to upload"
        )
    return run / RESULT


def look_through(parcel: Parcel) -> None:
    """Check that nothing goes out that must not.

    Raises:
        ValueError: a file has an absolute path or a token; all findings are named.
    """
    token = get_token()
    faults: list[str] = []
    for name, one in parcel.files.items():
        found = dict.fromkeys(found_in(_text(one), paths=name not in _VOCABULARY, token=token))
        faults += [f"{name} has {what}" for what in list(found)[:3]]
    if faults:
        raise ValueError(
            f"{'; '.join(faults)}: nothing is uploaded; correct the files, or write a copy without "
            "with grasp-lora export --to peft"
        )


def _text(one: Path | bytes) -> str:
    if isinstance(one, bytes):
        return one.decode("utf-8", "replace")
    if one.suffix != ".safetensors":
        return one.read_text(encoding="utf-8", errors="replace")
    try:
        return notes_of_weights(one)
    except SafetensorError as error:
        raise ValueError(f"{shown_path(one)} is damaged ({error}); copy it again") from error


def look_at(repo: str, public: bool) -> Place:
    """Ask the hub who is logged in, and what the repository holds.

    Args:
        repo: id of the repository, owner/name.
        public: whether a new one is public.

    Raises:
        ValueError: the id is none, there is no login, the hub does not answer, or the repository is
            there and private though `public` was asked for.
    """
    if "/" not in hub_id(repo):
        raise ValueError(f"{shown(repo)} names no owner; write owner/name")
    if not get_token():
        raise ValueError("there is no login for the hub: run hf auth login, or set HF_TOKEN")
    with _hub_words():
        api = HfApi()
        user = api.whoami()["name"]
        try:
            found = api.model_info(repo)
        except RepositoryNotFoundError:
            return Place(repo, user, not public, None)
    if public and found.private:
        raise ValueError(
            f"{repo} is there and private; change that in its settings on the hub, or leave out "
            "--public"
        )
    there = tuple(one.rfilename for one in found.siblings or ())
    return Place(repo, user, bool(found.private), there)


def upload(parcel: Parcel, place: Place) -> str:
    """Upload all files in one commit, into a new repository if there is none; return its address.

    Other files of the repository stay. What was interrupted can be done again.

    Raises:
        ValueError: the hub does not take it.
    """
    operations = [
        CommitOperationAdd(name, one if isinstance(one, bytes) else str(one))
        for name, one in parcel.files.items()
    ]
    with _hub_words():
        api = HfApi()
        made = api.create_repo(place.repo, private=place.private, exist_ok=True)
        api.create_commit(place.repo, operations, commit_message=_MESSAGE)
    return str(made)


def preview(parcel: Parcel, place: Place) -> Iterator[str]:
    """Yield what an upload would do, a line each."""
    kind = "private" if place.private else "public, everybody can read it"
    state = "new" if place.there is None else "there already"
    yield f"to {place.repo} ({kind}; {state}), as {place.user}:"
    for name, size in parcel.sizes().items():
        yield f"  {name}  {size / 1e6:.2f} MB" if size >= 1e5 else f"  {name}  {size / 1e3:.1f} kB"
    yield f"looked through {len(parcel.files)} files: no absolute path and no token"
    if any(name in parcel.files for name in REPORTS):
        yield "the reports show questions, texts and answers of test rows; of paths the last name"
    if parcel.stays:
        yield f"not uploaded: {', '.join(parcel.stays)}"
    kept = sorted(set(place.there or ()) - parcel.files.keys())
    if kept:
        yield f"other files in {place.repo} stay: {', '.join(kept)}"


_SAID: Mapping[int, str] = {
    401: "the hub does not take your token: run hf auth login again",
    403: "the hub does not let you write there: check the owner, and that your token may write",
}


# The client's own errors differ between versions; in all they are the bases of the hub's.
_OF_CLIENT: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
_OF_HUB = (RuntimeError, OSError, *_OF_CLIENT)


@contextmanager
def _hub_words() -> Iterator[None]:
    """Turn errors of the hub and of its client into one line."""
    try:
        yield
    except _OF_HUB as error:
        # A file that could not be sent is told by another error, which the first one caused.
        answer = getattr(error.__cause__ or error, "response", None)
        said = _SAID.get(getattr(answer, "status_code", 0))
        if said is None:
            why = shortened(str(error).strip().split("\n")[0] or type(error).__name__)
            said = f"the hub does not answer as it should ({why}): try the same command again"
        raise ValueError(said) from error
