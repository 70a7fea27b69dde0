"""Delivery: what leaves the machine, recordings and webhooks, from a queue on the disk that survives any crash."""

from streamsink.delivery.upload import parse_target
from streamsink.delivery.webhook import check_url, sign, verify
from streamsink.delivery.work import Delivery, Expected

__all__ = ["Delivery", "Expected", "check_url", "parse_target", "sign", "verify"]
