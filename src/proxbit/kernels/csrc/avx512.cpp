#include "level.h"
namespace {
bool no() { return false; }
}
const proxbit::Level proxbit::avx512_level = {"avx512", no, {}, nullptr, nullptr};
