// Results of notebooks follow the theme of JupyterLab; here that is the theme of the page.
function follow() {
  document.body.dataset.jpThemeLight = String(document.body.dataset.mdColorScheme !== "slate");
}
new MutationObserver(follow).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
follow();
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
