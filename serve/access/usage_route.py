"""GET /v1/usage: what the caller's tenant has used and has."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request

from serve import schema
from serve.access.accounting import Accounting
from serve.access.ledger import KEPT_DAYS
from serve.pipeline import Pipeline


class UsageRoute:
    """The route."""

    def __init__(self, pipeline: Pipeline, accounting: Accounting) -> None:
        self._pipeline = pipeline
        self._accounting = accounting

    def router(self) -> APIRouter:
        """The route."""
        router = APIRouter()
        router.get("/v1/usage")(self.usage)
        return router

    async def usage(
        self, request: Request, days: Annotated[int, Query(ge=1, le=KEPT_DAYS)] = 31
    ) -> schema.TenantUsage:
        """What the tenant of the key has used, on each of the last days (UTC) on which it used
        anything, and what it has and may have."""
        tenant = request.state.caller.tenant
        used = await self._accounting.usage(tenant.name)
        held = await self._pipeline.call(self._pipeline.retriever.stored, tenant.name)
        return schema.TenantUsage(
            tenant=tenant.name,
            data=[
                schema.DayOfUsage(day=day, **asdict(one)) for day, one in list(used.items())[:days]
            ],
            datastores=len(held),
            entries=sum(one.entries for one in held),
            quotas=tenant.quotas.model_dump(),
        )
