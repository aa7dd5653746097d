// Loads, stores and asynchronous copies.
#pragma once

#include <cstring>
#include <string>

#include "machine_arithmetic.h"
#include "races.h"

namespace ptx {

namespace host = jlebm::cuda::host;
constexpr u64 kSharedStart = 1024; // the first kilobyte is the system's on sm_90

inline void* shared_at(u64 address, int bytes, int alignment, const char* who) {
    unsigned char* at = host::shared_base() + s64(u32(address)) - s64(kSharedStart);
    host::check_shared(at, bytes, alignment, who);
    return at;
}
inline void* own_shared(u64 address) { return host::shared_base() + s64(u32(address)) - s64(kSharedStart); }
// noticed where somebody looks for races
inline void* noticed(void* at, int bytes, races::Access kind, const char* who, const void* value = nullptr) {
    if (races::wanted()) races::access(at, bytes, kind, who, value);
    return at;
}
inline void* aligned(u64 address, int bytes) {
    if (address % u64(bytes))
        throw std::runtime_error("an access of " + std::to_string(bytes) + " bytes that is not aligned to them");
    return reinterpret_cast<void*>(address);
}
template <class T, class D>
inline void take(const unsigned char*& from, D& d) {
    T value;
    std::memcpy(&value, from, sizeof value);
    from += sizeof value;
    d = D(value);
}
template <class T, class... D>
inline void load_from(const void* at, D&... d) {
    const auto* from = static_cast<const unsigned char*>(at);
    unsigned char all[sizeof(T) * sizeof...(D)]; // before the first register changes: it may be the address
    std::memcpy(all, from, sizeof all);
    const unsigned char* next = all;
    (take<T>(next, d), ...);
}
#define JLEBM_PTX_MEMORY(space, place)                                                                                 \
    template <class T, class... D>                                                                                     \
    inline void load_##space(u64 address, D&&... d) {                                                                  \
        constexpr int bytes = int(sizeof(T) * sizeof...(D));                                                           \
        load_from<T>(noticed(place, bytes, races::Access::kRead, "ld." #space), d...);                                 \
    }                                                                                                                  \
    template <class T, class... S>                                                                                     \
    inline void store_##space(u64 address, S... values) {                                                              \
        const T all[] = {T(values)...};                                                                                \
        constexpr int bytes = int(sizeof all);                                                                         \
        std::memcpy(noticed(place, bytes, races::Access::kWrite, "st." #space, all), all, sizeof all);                 \
    }
JLEBM_PTX_MEMORY(global, aligned(address, bytes))
JLEBM_PTX_MEMORY(generic, aligned(address, bytes))
JLEBM_PTX_MEMORY(shared, shared_at(address, bytes, bytes, "ld or st.shared"))
// what no thread writes
template <class T, class... D>
inline void load_param(u64 address, D&&... d) {
    load_from<T>(aligned(address, int(sizeof(T) * sizeof...(D))), d...);
}
template <class T, class... D>
inline void load_const(u64 address, D&&... d) {
    load_from<T>(aligned(address, int(sizeof(T) * sizeof...(D))), d...);
}
inline void cvta_to_global_u64(u64& d, u64 a) { d = a; }
inline void cvta_global_u64(u64& d, u64 a) { d = a; }
inline void cvta_shared_u64(u64& d, u64 a) { d = u64(own_shared(a)); }
inline void cvta_to_shared_u64(u64& d, u64 a) { d = a - u64(host::shared_base()) + kSharedStart; }
inline void cp_async(int bytes, u64 shared, u64 global, int source_bytes) {
    if (races::wanted()) races::copy_issued(own_shared(shared), bytes);
    if (source_bytes > 0)
        noticed(reinterpret_cast<void*>(global), source_bytes, races::Access::kRead, "the reading of cp.async");
    host::copy_async(own_shared(shared), reinterpret_cast<const void*>(global), bytes, source_bytes);
}
inline void cp_async_ca_shared_global(u64 to, u64 from, s64 bytes, s64 source) {
    cp_async(int(bytes), to, from, int(source));
}
inline void cp_async_ca_shared_global(u64 to, u64 from, s64 bytes) { cp_async(int(bytes), to, from, int(bytes)); }
inline void cp_async_cg_shared_global(u64 to, u64 from, s64 bytes, s64 source) {
    if (bytes != 16) throw std::runtime_error("cp.async.cg copies 16 bytes, not " + std::to_string(bytes));
    cp_async(16, to, from, int(source));
}
inline void cp_async_cg_shared_global(u64 to, u64 from, s64 bytes) {
    cp_async_cg_shared_global(to, from, bytes, bytes);
}
inline void cp_async_commit_group() {
    if (races::wanted()) races::copies_committed();
    host::copy_commit();
}
inline void cp_async_wait_group(s64 in_flight) {
    host::copy_wait(int(in_flight));
    if (races::wanted()) races::copies_waited(int(in_flight));
}
inline void cp_async_wait_all() { cp_async_commit_group(), cp_async_wait_group(0); }

} // namespace ptx
