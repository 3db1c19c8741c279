"""SVG to PNG, by CairoSVG."""

from __future__ import annotations

from indistill_fx.errors import ConfigError


def to_png(svg: str, *, width: int = 1840) -> bytes:
    """The picture in pixels.

    Args:
        svg: the text of an SVG file.
        width: of the PNG.

    Raises:
        ConfigError: CairoSVG, or the cairo library that it needs, is not installed.
    """
    try:
        import cairosvg
    except ImportError as error:
        raise ConfigError(
            "A PNG file needs CairoSVG, which is not installed.",
            where="--png",
            hint="pip install 'indistill-fx[png]', or write --svg, which needs nothing.",
        ) from error
    except OSError as error:  # CairoSVG is there, libcairo is not
        raise ConfigError(
            "A PNG file needs the cairo library, which is not installed.",
            where="--png",
            hint="Install it (Debian: apt-get install libcairo2; macOS: brew install cairo), or write --svg, which needs nothing.",
        ) from error
    found: bytes = cairosvg.svg2png(bytestring=svg.encode(), output_width=width)
    return found
