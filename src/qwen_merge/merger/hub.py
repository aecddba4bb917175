"""Sources on the Hugging Face hub (or what HF_ENDPOINT names), through huggingface_hub.

The revision is resolved to a commit once, so that all files are of one state of the repository and the manifest can
name it. With HF_HUB_OFFLINE=1 the local cache is all there is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import requests
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qwen_merge.errors import UserError
from qwen_merge.merger.sources import Source

Result = TypeVar("Result")


class HubSource(Source):
    """A repository at one commit. `path` downloads a file the first time it is asked for."""

    def __init__(self, repo: str, role: str, revision: str | None, offline: bool = False) -> None:
        """offline: look only in the local cache, as HF_HUB_OFFLINE=1 does."""
        self.repo, self.role, self.revision = repo, role, revision
        self.offline = offline or constants.HF_HUB_OFFLINE
        if self.offline:
            # Only finds the snapshot's folder; nothing is asked of any server.
            directory = Path(self._ask(lambda: snapshot_download(repo, revision=revision, local_files_only=True)))
            self.commit = directory.name
            super().__init__(directory, role)
            return
        info = self._ask(lambda: HfApi().model_info(repo, revision=revision))
        self.commit = str(info.sha)
        self.files = {sibling.rfilename for sibling in info.siblings or ()}
        super().__init__(Path(repo), role)

    @property
    def name(self) -> str:
        return f"{self.repo} at {self.commit}"

    def has(self, file: str) -> bool:
        return super().has(file) if self.offline else file in self.files

    def path(self, file: str) -> Path:
        if self.offline:
            return super().path(file)
        if file not in self.files:
            raise UserError(f"the {self.role} repository {self.name} has no {file}.")
        # One file is asked for by the revision's own name: the cache then knows the name, for a later offline run.
        revision = (self.revision or "main") if file == "config.json" else self.commit
        path = Path(self._ask(lambda: hf_hub_download(self.repo, file, revision=revision)))
        if path.parent.name != self.commit:  # the branch has moved since its commit was looked up
            path = Path(self._ask(lambda: hf_hub_download(self.repo, file, revision=self.commit)))
        self.directory = path.parent
        return path

    def origin(self) -> dict[str, str]:
        asked = {"requested_revision": self.revision} if self.revision else {}
        return {"repo": self.repo, "revision": self.commit, **asked}

    def _ask(self, request: Callable[[], Result]) -> Result:
        """Run a request; turn what the hub library raises into a message for the user."""
        looked = f"there is no directory {Path(self.repo).absolute()}"
        try:
            return request()
        except GatedRepoError:
            problem = "needs an accepted licence: accept it on its page and log in with `huggingface-cli login`"
        except RepositoryNotFoundError:
            problem = (
                f"is neither a local directory nor a repository on {constants.ENDPOINT}; {looked}. Check the spelling; "
                "a private one needs `huggingface-cli login`"
            )
        except RevisionNotFoundError:
            problem = f"has no revision {self.revision!r}; expected a branch, a tag or a full commit"
        except LocalEntryNotFoundError as error:
            if self.offline:
                problem = (
                    f"is not in the local cache, and no network may be used (HF_HUB_OFFLINE); {looked}. Name a "
                    "directory instead"
                )
            else:
                problem = _unreachable(error.__cause__, looked)
        except EntryNotFoundError as error:
            problem = f"lacks a file that its listing names ({error})"
        except HFValidationError as error:
            problem = f"is neither a local directory nor a valid hub id ({error}); {looked}"
        except HfHubHTTPError as error:
            problem = f"cannot be read from {constants.ENDPOINT} ({error})"
        except requests.exceptions.RequestException as error:
            problem = _unreachable(error, looked)
        except OSError as error:
            problem = f"was not downloaded completely ({error}). Run again to resume"
        raise UserError(f"the {self.role} {self.repo} {problem}.")


def _unreachable(error: BaseException | None, looked: str) -> str:
    """In plain words: what requests says are the names of its own classes and the addresses of objects."""
    reasons = (  # the special before the general
        (requests.exceptions.ProxyError, "the proxy does not let it through"),
        (requests.exceptions.SSLError, "its certificate is not accepted"),
        (requests.exceptions.Timeout, "it does not answer in time"),
        (requests.exceptions.ChunkedEncodingError, "the connection broke off"),
        (requests.exceptions.ConnectionError, "this machine is offline, or there is no such server, or it hung up"),
    )
    why = next((reason for kind, reason in reasons if isinstance(error, kind)), "it cannot be reached")
    return (
        f"is no local directory, and cannot be downloaded from {constants.ENDPOINT}: {why}. Run again to "
        f"resume, or name a directory instead: {looked}"
    )
