"""What a run did, for people: the record it leaves beside its weights, and the page and the model card's section that
are made of it.

    quantize --collect.py--> awq_report.json --record.py--> Record --summary.py--> numbers by block and kind of linear
    awq eval --json ------------evaluations.py--> tables                  |-> plots.py (SVG), tables.py
                                                                          |-> page.py (HTML), card.py (markdown)
"""

from awq_core.report.card import update_card
from awq_core.report.page import page_text, write_page
from awq_core.report.record import PAGE, RECORD, Cost, Record, add_evaluations, read_record, write_record

__all__ = [
    "PAGE",
    "RECORD",
    "Cost",
    "Record",
    "add_evaluations",
    "page_text",
    "read_record",
    "update_card",
    "write_page",
    "write_record",
]
