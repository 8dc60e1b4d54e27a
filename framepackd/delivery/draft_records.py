"""Has the record of a draft, where it lies in the outbox, name the final that was made of it."""

import json
import logging
from pathlib import Path

from framepackd import files, rights
from framepackd.jobs.drafts import MAX_RECORD_BYTES
from framepackd.jobs.folder import where
from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config

log = logging.getLogger(__name__)


def name_in_draft(final: Job, output: Path, config: Config, store: JobStore) -> None:
    """Name a final that is delivered in its draft's ``NAME.json``; an error is only logged."""
    identity = (final.settings.get("draft_of") or {}).get("id")
    draft = store.find(identity) if identity else None
    if draft is None:
        return
    folder, stem = where(draft)
    path = config.outbox / folder / f"{stem}.json"
    try:
        with files.open_regular(path) as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
        if record["id"] == draft.id:
            record["final"] |= {"id": final.id, "output": str(output)}
            files.write_json(path, record)
            rights.share(path)
    except FileNotFoundError:  # moved into the inbox, or away
        pass
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("job %s: the record of its draft %s cannot name it: %s", final.id, draft.id, error)
