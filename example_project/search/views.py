"""The page."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from search.models import Document

#: None of them shares a word that matters with the text it finds.
SUGGESTIONS = (
    "my website is down since the new release",
    "why is the air so pleasant once a storm has passed",
    "guiding sailors through the dark",
    "insects that survive the cold months",
    "how an epidemic was ended",
)


@require_GET
def page(request: HttpRequest) -> HttpResponse:
    """Show the library and the two forms; ``page.js`` does the rest through the JSON API."""
    listed = list(Document.objects.all())
    return render(request, "search/page.html", {"documents": listed, "suggestions": SUGGESTIONS})
