// A libcuda.so.1 whose device is the host's memory: what the real cuda-bindings call in tests.
//
// Compiled by test_cuda_abi.py against NVIDIA's own cuda.h, so every signature is the driver's.
// A handle is a file in memory and a mapping is one of the host's, so contents are real, and what is
// not mapped or not open can't be touched. Rules are those of NVIDIA's documentation; where that
// leaves room the stricter reading holds. Events follow work that a test begins and ends by the
// stand_in_ calls. Settings by environment: STAND_IN_BYTES (of a device), STAND_IN_NO_VMM.

#define _GNU_SOURCE
#include <cuda.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { NUM_DEVICES = 2, HOST = NUM_DEVICES, HOST_NODE = 1, MAX_ITEMS = 4096, MAX_STREAMS = 16 };
static const size_t GRANULE = 2u << 20;
static const unsigned long long FIRST_HANDLE = 1ull << 40; // no handle fits 32 bits

typedef struct {
    size_t size; // 0: free
    int device; // or HOST
    int file;
    int is_held; // not yet released
    int num_mappings;
} Handle;

typedef struct {
    CUdeviceptr address; // 0: free
    size_t size;
    int handle; // of a mapping
} Range;

struct CUctx_st {
    int device;
    int is_retained;
};

struct CUevent_st {
    CUcontext context;
    CUstream stream;
    unsigned long long after; // done when so many works of the stream have ended
    int is_recorded;
};

typedef struct {
    CUstream stream;
    unsigned long long begun, ended;
    CUdeviceptr address; // what the works under way read
    size_t size;
} Stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Handle handles[MAX_ITEMS];
static Range reservations[MAX_ITEMS], mappings[MAX_ITEMS];
static Stream streams[MAX_STREAMS];
static struct CUctx_st primaries[NUM_DEVICES];
static int is_initialised, num_events, num_violations;
static char failing[64]; // the call that fails, after so many that do not
static int failing_after;
static CUresult failing_with;
static __thread CUcontext current;

// ---- what tests ask and tell -----------------------------------------------------------------

#define TEST_CALL __attribute__((visibility("default")))

static Stream *stream_of(CUstream stream) {
    for (int i = 0; i < MAX_STREAMS; ++i) {
        if (streams[i].begun == 0 || streams[i].stream == stream) {
            streams[i].stream = stream;
            return &streams[i];
        }
    }
    abort();
}

TEST_CALL void stand_in_begin(unsigned long long stream, CUdeviceptr address, size_t size) {
    pthread_mutex_lock(&lock);
    Stream *at = stream_of((CUstream)stream);
    at->begun += 1;
    at->address = address;
    at->size = size;
    pthread_mutex_unlock(&lock);
}

TEST_CALL void stand_in_end(unsigned long long stream) {
    pthread_mutex_lock(&lock);
    Stream *at = stream_of((CUstream)stream);
    at->ended = at->begun;
    pthread_mutex_unlock(&lock);
}

TEST_CALL void stand_in_fail(const char *call, int after, int result) {
    pthread_mutex_lock(&lock);
    strncpy(failing, call, sizeof failing - 1);
    failing_after = after;
    failing_with = (CUresult)result;
    pthread_mutex_unlock(&lock);
}

static size_t used_bytes(int device) {
    size_t sum = 0;
    for (int i = 0; i < MAX_ITEMS; ++i) sum += handles[i].device == device ? handles[i].size : 0;
    return sum;
}

static int count(const Range *ranges) {
    int found = 0;
    for (int i = 0; i < MAX_ITEMS; ++i) found += ranges[i].address != 0;
    return found;
}

// What is left: bytes of each device, mappings, reservations, events; unmaps under work that reads;
// bytes of the host.
TEST_CALL void stand_in_state(unsigned long long *state) {
    pthread_mutex_lock(&lock);
    state[0] = used_bytes(0);
    state[1] = used_bytes(1);
    state[2] = (unsigned long long)count(mappings);
    state[3] = (unsigned long long)count(reservations);
    state[4] = (unsigned long long)num_events;
    state[5] = (unsigned long long)num_violations;
    state[6] = used_bytes(HOST);
    pthread_mutex_unlock(&lock);
}

// ---- helpers -----------------------------------------------------------------------------------

static CUresult begin_call(const char *name) {
    pthread_mutex_lock(&lock);
    if (!is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (strcmp(failing, name) == 0 && failing_after-- == 0) {
        failing[0] = 0;
        return failing_with;
    }
    return CUDA_SUCCESS;
}

static CUresult end_call(CUresult result) {
    pthread_mutex_unlock(&lock);
    return result;
}

#define BEGIN()                                                                                    \
    do {                                                                                           \
        CUresult begun_ = begin_call(__func__);                                                    \
        if (begun_ != CUDA_SUCCESS) return end_call(begun_);                                       \
    } while (0)

#define REQUIRE(condition, error)                                                                  \
    do {                                                                                           \
        if (!(condition)) return end_call(error);                                                  \
    } while (0)

static size_t total_bytes(void) {
    const char *text = getenv("STAND_IN_BYTES");
    return text ? strtoull(text, NULL, 10) : (size_t)64 << 20;
}

static int free_place(const Range *ranges) {
    for (int i = 0; i < MAX_ITEMS; ++i) {
        if (ranges[i].address == 0) return i;
    }
    abort();
}

static int is_inside(const Range *ranges, CUdeviceptr address, size_t size) {
    for (int i = 0; i < MAX_ITEMS; ++i) {
        const Range *at = &ranges[i];
        if (at->address && at->address <= address && address + size <= at->address + at->size)
            return 1;
    }
    return 0;
}

static int meets(const Range *range, CUdeviceptr address, size_t size) {
    return range->address && range->address < address + size &&
           address < range->address + range->size;
}

static int meets_mapping(CUdeviceptr address, size_t size) {
    for (int i = 0; i < MAX_ITEMS; ++i) {
        if (meets(&mappings[i], address, size)) return 1;
    }
    return 0;
}

static int exists(int device) { return 0 <= device && device < NUM_DEVICES; }

static Handle *handle_of(CUmemGenericAllocationHandle number) {
    if (number < FIRST_HANDLE || number >= FIRST_HANDLE + MAX_ITEMS) return NULL;
    Handle *handle = &handles[number - FIRST_HANDLE];
    return handle->size && handle->is_held ? handle : NULL;
}

// Memory goes when a handle is neither held nor mapped.
static void drop_if_unused(Handle *handle) {
    if (handle->is_held || handle->num_mappings) return;
    close(handle->file);
    handle->size = 0;
}

static CUresult check_properties(const CUmemAllocationProp *prop) {
    if (prop == NULL || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
    if (prop->requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE) return CUDA_ERROR_NOT_SUPPORTED;
    if (prop->location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA) {
        return prop->location.id == HOST_NODE ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }
    if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
    return exists(prop->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

// ---- devices and contexts ----------------------------------------------------------------------

CUresult CUDAAPI cuInit(unsigned int flags) {
    pthread_mutex_lock(&lock);
    REQUIRE(flags == 0, CUDA_ERROR_INVALID_VALUE);
    is_initialised = 1;
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
    BEGIN();
    REQUIRE(exists(ordinal), CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    BEGIN();
    REQUIRE(exists(device), CUDA_ERROR_INVALID_DEVICE);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
        *value = getenv("STAND_IN_NO_VMM") == NULL;
        break;
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
        *value = getenv("STAND_IN_NO_HOST") == NULL;
        break;
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: *value = HOST_NODE; break;
    default: return end_call(CUDA_ERROR_INVALID_VALUE);
    }
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    BEGIN();
    REQUIRE(exists(device), CUDA_ERROR_INVALID_DEVICE);
    primaries[device] = (struct CUctx_st){device, 1};
    *context = &primaries[device];
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
    BEGIN();
    REQUIRE(context == NULL || context->is_retained, CUDA_ERROR_INVALID_CONTEXT);
    current = context;
    return end_call(CUDA_SUCCESS);
}

// ---- virtual memory ----------------------------------------------------------------------------

CUresult CUDAAPI cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
                                               CUmemAllocationGranularity_flags option) {
    BEGIN();
    CUresult checked = check_properties(prop);
    REQUIRE(checked == CUDA_SUCCESS, checked);
    REQUIRE(option == CU_MEM_ALLOC_GRANULARITY_MINIMUM ||
                option == CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
            CUDA_ERROR_INVALID_VALUE);
    *granularity = GRANULE;
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment,
                                     CUdeviceptr addr, unsigned long long flags) {
    BEGIN();
    REQUIRE(size && size % GRANULE == 0 && flags == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE((alignment & (alignment - 1)) == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(addr == 0, CUDA_ERROR_NOT_SUPPORTED);
    size_t step = alignment > GRANULE ? alignment : GRANULE;
    int flags_of_host = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *raw = mmap(NULL, size + step, PROT_NONE, flags_of_host, -1, 0);
    REQUIRE(raw != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
    CUdeviceptr first = ((CUdeviceptr)raw + step - 1) / step * step;
    size_t before = first - (CUdeviceptr)raw;
    if (before) munmap(raw, before);
    if (step - before) munmap((char *)first + size, step - before);
    reservations[free_place(reservations)] = (Range){first, size, 0};
    *ptr = first;
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemAddressFree(CUdeviceptr ptr, size_t size) {
    BEGIN();
    REQUIRE(!meets_mapping(ptr, size), CUDA_ERROR_INVALID_VALUE);
    for (int i = 0; i < MAX_ITEMS; ++i) {
        if (reservations[i].address != ptr || reservations[i].size != size || !ptr) continue;
        munmap((void *)ptr, size);
        reservations[i].address = 0;
        return end_call(CUDA_SUCCESS);
    }
    return end_call(CUDA_ERROR_INVALID_VALUE);
}

CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle *number, size_t size,
                             const CUmemAllocationProp *prop, unsigned long long flags) {
    BEGIN();
    CUresult checked = check_properties(prop);
    REQUIRE(checked == CUDA_SUCCESS, checked);
    REQUIRE(size && size % GRANULE == 0 && flags == 0, CUDA_ERROR_INVALID_VALUE);
    int is_host = prop->location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA;
    int device = is_host ? HOST : prop->location.id;
    REQUIRE(is_host || used_bytes(device) + size <= total_bytes(), CUDA_ERROR_OUT_OF_MEMORY);
    int place = 0;
    while (handles[place].size) place += 1;
    int file = memfd_create("handle", MFD_CLOEXEC);
    REQUIRE(file >= 0 && ftruncate(file, (off_t)size) == 0, CUDA_ERROR_OUT_OF_MEMORY);
    handles[place] = (Handle){size, device, file, 1, 0};
    *number = FIRST_HANDLE + (unsigned long long)place;
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle number) {
    BEGIN();
    Handle *handle = handle_of(number);
    REQUIRE(handle, CUDA_ERROR_INVALID_VALUE);
    handle->is_held = 0;
    drop_if_unused(handle);
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuMemMap(CUdeviceptr ptr, size_t size, size_t offset,
                          CUmemGenericAllocationHandle number, unsigned long long flags) {
    BEGIN();
    Handle *handle = handle_of(number);
    REQUIRE(handle && offset == 0 && flags == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(size && size <= handle->size && size % GRANULE == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(ptr % GRANULE == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_inside(reservations, ptr, size), CUDA_ERROR_INVALID_VALUE);
    REQUIRE(!meets_mapping(ptr, size), CUDA_ERROR_INVALID_VALUE);
    void *at = mmap((void *)ptr, size, PROT_NONE, MAP_SHARED | MAP_FIXED, handle->file, 0);
    REQUIRE(at == (void *)ptr, CUDA_ERROR_OUT_OF_MEMORY);
    handle->num_mappings += 1;
    mappings[free_place(mappings)] = (Range){ptr, size, (int)(handle - handles)};
    return end_call(CUDA_SUCCESS);
}

// The range holds whole mappings and has no gaps.
CUresult CUDAAPI cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc,
                                size_t count_of_desc) {
    BEGIN();
    REQUIRE(size && desc && count_of_desc == 1, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(desc->location.type == CU_MEM_LOCATION_TYPE_DEVICE, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(desc->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE, CUDA_ERROR_NOT_SUPPORTED);
    size_t covered = 0;
    for (int i = 0; i < MAX_ITEMS; ++i) {
        const Range *at = &mappings[i];
        if (!meets(at, ptr, size)) continue;
        REQUIRE(ptr <= at->address && at->address + at->size <= ptr + size,
                CUDA_ERROR_INVALID_VALUE);
        int owner = handles[at->handle].device;
        REQUIRE(owner == HOST || desc->location.id == owner, CUDA_ERROR_INVALID_DEVICE);
        covered += at->size;
    }
    REQUIRE(covered == size, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(mprotect((void *)ptr, size, PROT_READ | PROT_WRITE) == 0, CUDA_ERROR_UNKNOWN);
    return end_call(CUDA_SUCCESS);
}

// Exactly one mapping. Does not wait: an unmap under work that reads is counted.
CUresult CUDAAPI cuMemUnmap(CUdeviceptr ptr, size_t size) {
    BEGIN();
    for (int i = 0; i < MAX_ITEMS; ++i) {
        if (mappings[i].address != ptr || mappings[i].size != size || !ptr) continue;
        for (int s = 0; s < MAX_STREAMS; ++s) {
            const Stream *at = &streams[s];
            num_violations += at->begun > at->ended && meets(&mappings[i], at->address, at->size);
        }
        int host = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        if (mmap((void *)ptr, size, PROT_NONE, host, -1, 0) == MAP_FAILED) abort();
        mappings[i].address = 0;
        Handle *handle = &handles[mappings[i].handle];
        handle->num_mappings -= 1;
        drop_if_unused(handle);
        return end_call(CUDA_SUCCESS);
    }
    return end_call(CUDA_ERROR_INVALID_VALUE);
}

CUresult CUDAAPI cuMemGetInfo(size_t *free_bytes, size_t *total) {
    BEGIN();
    REQUIRE(current, CUDA_ERROR_INVALID_CONTEXT);
    *total = total_bytes();
    *free_bytes = *total - used_bytes(current->device);
    return end_call(CUDA_SUCCESS);
}

// ---- copies ----------------------------------------------------------------------------------

CUresult CUDAAPI cuStreamCreate(CUstream *stream, unsigned int flags) {
    BEGIN();
    REQUIRE(current, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(flags == CU_STREAM_NON_BLOCKING, CUDA_ERROR_NOT_SUPPORTED);
    *stream = (CUstream)malloc(1);
    return end_call(CUDA_SUCCESS);
}

static int is_mapped_throughout(CUdeviceptr address, size_t size) {
    size_t covered = 0;
    for (int i = 0; i < MAX_ITEMS; ++i) {
        const Range *at = &mappings[i];
        if (!meets(at, address, size)) continue;
        CUdeviceptr first = at->address > address ? at->address : address;
        CUdeviceptr end = at->address + at->size < address + size ? at->address + at->size
                                                                  : address + size;
        covered += end - first;
    }
    return covered == size;
}

// Done at once; what is not open ends the process, as a kernel's access would end the context.
CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream stream) {
    BEGIN();
    REQUIRE(current, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(is_mapped_throughout(dst, size) && is_mapped_throughout(src, size),
            CUDA_ERROR_INVALID_VALUE);
    memcpy((void *)dst, (const void *)src, size);
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
    BEGIN();
    REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
    return end_call(CUDA_SUCCESS);
}

// ---- events ------------------------------------------------------------------------------------

CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags) {
    BEGIN();
    REQUIRE(current, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(flags == CU_EVENT_DISABLE_TIMING, CUDA_ERROR_NOT_SUPPORTED);
    *event = calloc(1, sizeof **event);
    (*event)->context = current;
    num_events += 1;
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
    BEGIN();
    REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(current && current == event->context, CUDA_ERROR_INVALID_CONTEXT);
    event->stream = stream;
    event->after = stream_of(stream)->begun;
    event->is_recorded = 1;
    return end_call(CUDA_SUCCESS);
}

CUresult CUDAAPI cuEventQuery(CUevent event) {
    BEGIN();
    REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
    int is_done = !event->is_recorded || stream_of(event->stream)->ended >= event->after;
    return end_call(is_done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY);
}

CUresult CUDAAPI cuEventDestroy(CUevent event) {
    BEGIN();
    REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
    free(event);
    num_events -= 1;
    return end_call(CUDA_SUCCESS);
}

// ---- how the calls are found -------------------------------------------------------------------

#define ENTRY(name) {#name, (void *)name}

CUresult CUDAAPI cuGetProcAddress(const char *symbol, void **function, int version,
                                  cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    static const struct {
        const char *name;
        void *function;
    } table[] = {
        ENTRY(cuInit),
        ENTRY(cuDeviceGet),
        ENTRY(cuDeviceGetAttribute),
        ENTRY(cuDevicePrimaryCtxRetain),
        ENTRY(cuCtxSetCurrent),
        ENTRY(cuMemGetAllocationGranularity),
        ENTRY(cuMemAddressReserve),
        ENTRY(cuMemAddressFree),
        ENTRY(cuMemCreate),
        ENTRY(cuMemRelease),
        ENTRY(cuMemMap),
        ENTRY(cuMemSetAccess),
        ENTRY(cuMemUnmap),
        ENTRY(cuMemGetInfo),
        ENTRY(cuEventCreate),
        ENTRY(cuEventRecord),
        ENTRY(cuEventQuery),
        ENTRY(cuEventDestroy),
        ENTRY(cuStreamCreate),
        ENTRY(cuMemcpyAsync),
        ENTRY(cuStreamSynchronize),
        ENTRY(cuGetProcAddress),
    };
    (void)version, (void)flags;
    *function = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; ++i) {
        if (strcmp(table[i].name, symbol) == 0) *function = table[i].function;
    }
    if (status) {
        *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    }
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
