// Calls one exported function of the CPU kernels, compiled for another processor and run in an emulator.
//
// emulated CALL OUT. CALL is 64-bit integers: the function (0 lte_ffn, 1 lte_quantized_linear, 2 lte_quantized_ffn), its
// numbers (at most six: type, bits or activation, and so on), the lengths of shape, mask and each pointer's memory in
// bytes, of which the last is the output's; then shape, mask and memories. OUT is the output's memory.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" int lte_ffn(int, const int64_t*, int, int, int, const uint8_t*, void* const*);
extern "C" int lte_quantized_linear(int, int, const int64_t*, int, void* const*);
extern "C" int lte_quantized_ffn(int, int, const int64_t*, int, int, const uint8_t*, void* const*);

int main(int, char** argv) {
    FILE* const call = std::fopen(argv[1], "rb");
    auto integer = [&] {
        int64_t i = 0;
        if (std::fread(&i, 8, 1, call) != 1) std::abort();
        return i;
    };
    const int64_t function = integer();
    int numbers[6];
    for (int& number : numbers) number = int(integer());
    std::vector<std::vector<uint8_t>> memories(integer());
    for (auto& memory : memories) memory.resize(integer());
    for (auto& memory : memories)
        if (!memory.empty() && std::fread(memory.data(), memory.size(), 1, call) != 1) std::abort();
    const auto shape = reinterpret_cast<const int64_t*>(memories[0].data());
    const uint8_t* const mask = memories[1].data();
    std::vector<void*> pointers;
    for (size_t i = 2; i < memories.size(); i++) pointers.push_back(memories[i].empty() ? nullptr : memories[i].data());
    const auto [a, b, c, d, e, f] = numbers;
    const int status = function == 0   ? lte_ffn(a, shape, b, c, d, mask, pointers.data())
                       : function == 1 ? lte_quantized_linear(a, b, shape, c, pointers.data())
                                       : lte_quantized_ffn(a, b, shape, c, d, mask, pointers.data());
    FILE* const out = std::fopen(argv[2], "wb");
    std::fwrite(memories.back().data(), memories.back().size(), 1, out);
    std::fclose(out);
    return status;
}
