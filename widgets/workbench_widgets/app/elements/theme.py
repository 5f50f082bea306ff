"""How the page looks: the theme, and the few styles that belong to no component."""

from __future__ import annotations

from workbench_widgets.colours import DARK, LIGHT, Theme

EXTENSIONS = ("plotly", "tabulator")

_SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def _mode(colours: Theme) -> dict[str, object]:
    return {
        "palette": {
            "primary": {"main": colours.accent},
            "warning": {"main": colours.mark},
            "divider": colours.line,
            "text": {"primary": colours.ink, "secondary": colours.muted},
            "background": {"default": colours.surface, "paper": colours.surface},
        },
        "typography": {"fontFamily": _SANS, "fontSize": 12.5, "button": {"textTransform": "none", "fontWeight": 600}},
        "components": {
            "MuiAppBar": {
                "styleOverrides": {
                    "root": {
                        "backgroundColor": colours.surface,
                        "backgroundImage": "none",
                        "color": colours.ink,
                        "boxShadow": f"inset 0 -1px 0 {colours.line}",
                        "& .MuiTypography-root, & h3, & a": {"color": f"{colours.ink} !important", "fontSize": "17px"},
                        "& .MuiIconButton-root, & .MuiButton-root": {"color": f"{colours.ink} !important"},
                        "& .MuiButton-outlined": {"borderColor": f"{colours.line} !important"},
                    }
                }
            },
            "MuiToolbar": {"styleOverrides": {"root": {"minHeight": "52px !important"}}},
            "MuiToggleButton": {"styleOverrides": {"root": {"whiteSpace": "nowrap", "padding": "4px 14px"}}},
            "MuiPaper": {"styleOverrides": {"root": {"backgroundImage": "none"}}},
        },
    }


# Panel's header paints what lies in it white, for a coloured bar; ours has the colour of the page in both themes.
_GREY = "#7a8592 !important"

HEADING_STYLE = f"h2 {{ margin: 0; font: 600 15px/1.4 {_SANS}; }}"  # of an HTML pane with a heading
NOTE_STYLE = f"div {{ font: 12px/1.4 {_SANS}; opacity: .75; }}"  # of an HTML pane with a note


def theme_config() -> dict[str, object]:
    """The light and the dark theme, as Material components take them."""
    return {"light": _mode(LIGHT), "dark": _mode(DARK)}


def in_header() -> dict[str, object]:
    """The style of a component in the page's header."""
    return {
        "color": _GREY,
        "borderColor": _GREY,
        "& .MuiLinearProgress-bar": {"backgroundColor": _GREY},
        "&.MuiLinearProgress-root": {"backgroundColor": "#7a859240 !important"},
    }
