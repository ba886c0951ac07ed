#pragma once
// Pages in a real browser without a screen.

#include <cstdlib>
#include <filesystem>
#include <string>

#include "support/files.h"

namespace stbllm::test {

/// The command of a Chromium that starts here, empty where there is none.
inline std::string find_browser() {
  for (const std::string name : {"chromium", "chromium-browser", "google-chrome"})
    if (std::system((name + " --version > /dev/null 2>&1").c_str()) == 0) return name;
  return "";
}

/// Why a test of a page cannot run.
inline const char* const kNoBrowser = "no browser: chromium is not installed or does not start";

/// `page` after its scripts have run and ten seconds of its clock have passed, as HTML. Its directory gets
/// what the browser keeps.
inline std::string rendered(const std::string& browser, const std::filesystem::path& page,
                            bool is_dark = false) {
  const std::filesystem::path directory = page.parent_path(), result = directory / "rendered.html";
  const std::string command =
      browser + " --headless --no-sandbox --disable-gpu --virtual-time-budget=10000 " +
      // Files are then of one origin, so that the page of a test can look into a frame.
      "--allow-file-access-from-files " +
      (is_dark ? "--blink-settings=preferredColorScheme=0 " : "--blink-settings=preferredColorScheme=1 ") +
      "--user-data-dir=" + (directory / "browser").string() + " --dump-dom file://" + page.string() +
      " 2> /dev/null > " + result.string();
  EXPECT_EQ(std::system(command.c_str()), 0) << command;
  return read_all(result);
}

}  // namespace stbllm::test
