// Runs before the page is drawn, so that the chosen theme does not flash. settings.js writes what is read here.
try {
  const { theme } = JSON.parse(localStorage.getItem("nanochat.preferences") ?? "{}");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // no storage: the system's theme
}
