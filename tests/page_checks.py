# SPDX-License-Identifier: Apache-2.0
"""What is asked of every page in the browser."""


def overflow(page) -> int:
    """By how many pixels the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def findings(page) -> list[str]:
    """Serious and critical accessibility findings of axe-core, with the elements."""
    from axe_playwright_python.sync_playwright import Axe

    # Colours that are still fading from those of the other theme belong to none.
    page.evaluate("document.getAnimations().forEach(animation => animation.finish())")
    options = {"resultTypes": ["violations"]}
    violations = Axe().run(page, options=options).response["violations"]
    serious = [v for v in violations if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {[node['html'][:160] for node in v['nodes'][:4]]}" for v in serious]
