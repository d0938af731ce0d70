"""The library: texts and the vectors that stand for their meaning."""

from __future__ import annotations

from django.db import models


class DocumentQuerySet(models.QuerySet["Document"]):
    """Documents, and those among them that a search can find."""

    def searchable(self) -> DocumentQuerySet:
        return self.filter(embedding__isnull=False)

    def waiting(self) -> DocumentQuerySet:
        return self.filter(embedding__isnull=True)


class Document(models.Model):
    """A short text; a worker adds its embedding after it was saved."""

    title = models.CharField(max_length=120)
    text = models.TextField()
    #: 384 little-endian float32 numbers of length one; empty until a worker has computed them.
    embedding = models.BinaryField(null=True)
    embedded_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = DocumentQuerySet.as_manager()

    class Meta:
        ordering = ("-pk",)

    def __str__(self) -> str:
        return self.title

    @property
    def passage(self) -> str:
        """What the model reads: a title often carries the word that the text leaves out."""
        return f"{self.title}. {self.text}"
