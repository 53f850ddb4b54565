// MLflow's table of a study's evaluations, as the README shows it. Needs `npm install playwright-core` and Chromium.
// node docs/mlflow_compare.js http://127.0.0.1:5000 demo docs/mlflow_compare.png
const { chromium } = require("playwright-core");
const SHOWN = ["test/dice", "arm", "init", "seed", "shots"];
const HIDDEN = ["Dataset", "Source", "Models"];
(async () => {
  const [server, experiment, out] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
  const page = await browser.newPage({ viewport: { width: 1500, height: 520 } });
  const answer = await fetch(`${server}/api/2.0/mlflow/experiments/get-by-name?experiment_name=${experiment}`);
  const id = (await answer.json()).experiment.experiment_id;
  const query = new URLSearchParams({ searchFilter: "tags.stage = 'evaluate'", orderByKey: "metrics.`test/dice`" });
  await page.goto(`${server}/#/experiments/${id}/runs?${query}&orderByAsc=false`);
  await page.getByText("matching runs").waitFor({ timeout: 60000 });
  await page.waitForTimeout(5000);
  await page.getByRole("button", { name: "Columns", exact: true }).click({ timeout: 30000 });
  for (const name of [...SHOWN, ...HIDDEN]) {
    await page.getByPlaceholder("Search columns").fill(name);
    const title = page.locator("[class*=tree-title]").getByText(name, { exact: true });
    await title.first().click();
    await page.waitForTimeout(300);
  }
  await page.keyboard.press("Escape");
  await page.mouse.click(1463, 36); // MLflow's assistant
  await page.waitForTimeout(3000);
  await page.screenshot({ path: out });
  await browser.close();
})();
