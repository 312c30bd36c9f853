"""A model repository of the Hugging Face Hub as a Source, and what to do where the hub says no.

The token is huggingface_hub's affair: it reads HF_TOKEN or the stored login, and it is never printed.
"""

import re
from functools import cached_property
from typing import Any

from gemma_tpu.errors import UserError
from gemma_tpu.storage.remote import File, RemoteSource
from gemma_tpu.storage.retry import explain, status_of

_TIMEOUT = 60.0  # seconds without a byte


class HubSource(RemoteSource):
    """One revision of a repository, pinned to its commit when opened: a push meanwhile changes nothing."""

    def __init__(self, where: str):
        found = re.fullmatch(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([^@]+))?", where.rstrip("/"))
        if not found:
            raise UserError(f"{where}: a model of the hub is written hf://org/name or hf://org/name@revision")
        self.repo, self.asked = found[1], found[2] or "main"
        super().__init__(f"hf://{self.repo}" + (f"@{found[2]}" if found[2] else ""))
        # A gated repository shows its card to all and its files to those who accepted: ask for both.
        self.info = self._hub(lambda: self._api.model_info(self.repo, revision=self.asked))
        self._hub(lambda: self._api.auth_check(self.repo))
        self.revision = self.info.sha

    @cached_property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi()

    @property
    def licence(self) -> str:
        """As the model card names it."""
        card = self.info.card_data
        named = [getattr(card, key, None) for key in ("license_name", "license", "license_link")] if card else []
        return " ".join(dict.fromkeys(str(value) for value in named if value)) or "not named in the model card"

    def _list(self, recursive: bool) -> dict[str, File]:
        def ask() -> list[Any]:
            return [*self._api.list_repo_tree(self.repo, revision=self.revision, recursive=recursive)]

        files = {}
        for entry in self._hub(ask):
            if hasattr(entry, "blob_id"):  # folders have a tree_id
                sha256 = entry.lfs.sha256 if entry.lfs else None
                git_sha1 = None if entry.lfs else entry.blob_id
                files[entry.path] = File(entry.path, entry.size, sha256 or entry.blob_id, sha256, git_sha1)
        return files

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.revision, endpoint=self._api.endpoint)
        # Compressed on the way, a range would be one of other bytes.
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            whole = response.status_code == 200  # allowed by HTTP, and fine where it is what was asked for
            if whole and int(response.headers.get("Content-Length", -1)) != end - start:
                raise ConnectionError("the server ignored the range and sent the whole file")
            return response.read()

    def _hub(self, ask: Any) -> Any:
        from huggingface_hub import errors, get_token, is_offline_mode

        if is_offline_mode():
            raise UserError(f"{self.repo} is to come from the hub, and HF_HUB_OFFLINE is set: unset it, or give the "
                            "path of a folder that exists")
        try:
            return self._again(ask, f"asking the hub for {self.repo}", attempts=3)
        except errors.GatedRepoError:
            raise UserError(self._gated(get_token() is not None)) from None
        except errors.RevisionNotFoundError:
            raise UserError(f"{self.repo} has no revision {self.asked!r}: give a branch, a tag or a commit") from None
        except errors.RepositoryNotFoundError:
            raise UserError(f"the hub shows no model {self.repo} to {_who(get_token())}: check the "
                            f"spelling, and for a private one your access. {_SET_TOKEN}") from None
        except errors.HfHubHTTPError as error:
            if status_of(error) in (401, 403):
                raise UserError(f"the hub refuses {self.repo} to {_who(get_token())}: the token is wrong, expired "
                                f"or may not read this repository. {_SET_TOKEN}") from None
            raise UserError(f"the hub refuses {self.repo}: {explain(error)}") from None
        except errors.HFValidationError as error:
            raise UserError(f"{self.repo}: {explain(error)}") from None

    def _gated(self, has_token: bool) -> str:
        page = f"{self._api.endpoint}/{self.repo}"
        accept = f"log in and accept its licence at {page}"
        if has_token:
            return (f"{self.repo} is gated and the account of your token has no access yet: {accept} (a "
                    "fine-grained token also needs read access to gated repositories), then run this again")
        return f"{self.repo} is gated and no token is set: {accept}. {_SET_TOKEN}"


_SET_TOKEN = ("Then make a token with read access at https://huggingface.co/settings/tokens and give it by the "
              "environment: read -s HF_TOKEN && export HF_TOKEN")


def _who(token: str | None) -> str:
    return "the account of your token" if token else "anyone without a token"
