#pragma once
// The real program in two processes that calibrate together.

#include <arpa/inet.h>
#include <sys/socket.h>

#include <array>
#include <memory>

#include "child_process.h"

namespace stbllm::test {

/// A port of this machine that was free a moment ago.
inline std::string free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ::bind(fd, reinterpret_cast<sockaddr*>(&address), size);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ::close(fd);
  return std::to_string(ntohs(address.sin_port));
}

using Pair = std::array<std::unique_ptr<ChildProcess>, 2>;

/// Ranks 0 and 1, with a command each.
inline Pair start_pair(const std::vector<std::string>& first, const std::vector<std::string>& second,
                       std::map<std::string, std::string> environment = {}) {
  environment.merge(std::map<std::string, std::string>{
      {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", free_port()}, {"WORLD_SIZE", "2"}});
  Pair pair;
  for (int rank = 0; rank < 2; ++rank) {
    environment["RANK"] = std::to_string(rank);
    pair[rank] = std::make_unique<ChildProcess>(rank == 0 ? first : second, 0, environment);
  }
  return pair;
}

/// What both left behind.
inline std::array<Outcome, 2> run_pair(const std::vector<std::string>& args) {
  const Pair pair = start_pair(args, args);
  return {pair[0]->wait(), pair[1]->wait()};
}

}  // namespace stbllm::test
