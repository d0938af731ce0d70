"""``manage.py seed``: fill an empty library with the starter texts."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from search.models import Document
from search.starters import STARTERS
from search.tasks import make_searchable


class Command(BaseCommand):
    """Adds what is missing, so that running it twice changes nothing."""

    help = "Add the starter texts, and send every text without a vector to the model."

    def handle(self, *args: Any, **options: Any) -> None:
        present = set(Document.objects.values_list("title", flat=True))
        # The list shows the newest first: the first starter comes last into the table.
        missing = [pair for pair in reversed(STARTERS) if pair[0] not in present]
        Document.objects.bulk_create(Document(title=title, text=text) for title, text in missing)
        waiting = list(Document.objects.waiting())
        for document in waiting:
            # One by one, so that a text which the model refuses stops no other. The messages
            # wait in the broker until a worker has loaded the model.
            make_searchable(document)
        self.stdout.write(f"{len(missing)} texts added, {len(waiting)} sent to the model")
