const page = JSON.parse(document.getElementById("report").textContent);
if (page === null)
  root.append(html("p", {}, "This is the empty template of `stbllm report`."));
else if (page.sweep)
  sweepPage(page.sweep);
else if (page.weights)
  weightsPage(page.weights);
else
  runPage(page);
