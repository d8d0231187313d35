// Lets fake tensors name "mps" on a build of torch without Metal: a device guard that does nothing, and the hooks
// through which torch asks whether the device is there, which macOS it runs and how much memory it has. No kernel
// is ever run on it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kMps = c10::DeviceType::MPS;
constexpr size_t kMemory = size_t{12} << 30;  // what a Mac of 16 GB recommends at most, and its largest buffer
constexpr size_t kBuffer = size_t{9} << 30;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kMps> {
  static c10::Device device() { return c10::Device(kMps, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

// torch looks the class up by this very name.
struct MPSHooks : at::MPSHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasMPS() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isOnMacOSorNewer(unsigned major, unsigned) const override { return major <= 15; }
  void deviceSynchronize() const override {}
  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return 0; }
  size_t getDriverAllocatedMemory() const override { return 0; }
  size_t getRecommendedMaxMemory() const override { return kMemory; }
  size_t getMaxBufferLength() const override { return kBuffer; }
  void setMemoryFraction(double) const override {}
  // Saved and put back like the real one; nothing ever draws from it.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(MPS, Guard)

namespace at {
REGISTER_MPS_HOOKS(MPSHooks)
}  // namespace at

// A build of torch with CUDA names that as its accelerator and refuses two; this answer comes before its own.
namespace at::accelerator {
TORCH_API std::optional<c10::DeviceType> getAccelerator(bool) { return kMps; }
}  // namespace at::accelerator
