"""A corpus of the Hugging Face hub, or a folder laid out like one, as a list of local files.

`datasets` finds out which files make the split "train" of a name and configuration, and fetches those that
are not local into its own cache; what is in them is read by the readers of plain files.
"""

from __future__ import annotations

from pathlib import Path

from earlybert.config import EarlyBertError


def files(pattern: str, *, word: str) -> list[Path]:
    """The files of NAME[,CONFIG], in the corpus' order; `word` names the source in messages.

    Raises EarlyBertError for a name or configuration that is not there, or where the hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    name, _, configuration = pattern.partition(",")
    try:
        builder = datasets.load_dataset_builder(name, configuration or None)
        found = dict(builder.config.data_files or {})
        if "train" not in found:
            there = ", ".join(map(str, found)) or "none"
            raise EarlyBertError(
                f'source {word!r}: no split "train" (splits: {there}); give its files instead'
            )
        places = [str(place) for place in found["train"]]
        remote = [place for place in places if "://" in place]
        local = datasets.DownloadManager().download(remote) if remote else []
        fetched = dict(zip(remote, local, strict=True))
        return [Path(fetched.get(place, place)) for place in places]
    except EarlyBertError:
        raise
    except Exception as error:  # of the network, of the hub, of a wrong name: datasets has many kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise EarlyBertError(
            f"source {word!r}: {said}; check the name and its configuration, or download the files and give "
            "them as parquet:GLOB"
        ) from error
