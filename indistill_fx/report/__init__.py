"""Reports to look at: pages, pictures, text for Markdown."""

from indistill_fx.report.alignment_view import Alignment as Alignment
from indistill_fx.report.alignment_view import see as see
from indistill_fx.report.alignment_view import see_plan as see_plan
from indistill_fx.report.curves import charts_of as charts_of
from indistill_fx.report.curves import curves_svg as curves_svg
from indistill_fx.report.mermaid import alignment_mermaid as alignment_mermaid
from indistill_fx.report.pages import alignment_page as alignment_page
from indistill_fx.report.pages import run_page as run_page
from indistill_fx.report.pictures import alignment_svg as alignment_svg
from indistill_fx.report.pictures import to_png as to_png
from indistill_fx.report.read_runs import read_runs as read_runs
from indistill_fx.system.files import write as write
