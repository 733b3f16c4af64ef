#!/usr/bin/env bash
# Builds the native kernels for 64-bit ARM and checks them in an emulator.
# Wants CMake, ninja, aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu,
# qemu-user-static). An emulator shows that the arithmetic is right, nothing about speed.
set -euo pipefail
cd "$(dirname "$0")/.."

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cxx=${ARM_CXX:-aarch64-linux-gnu-g++}
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)
cmake -S sgl-kernel -B "$room" -G Ninja -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$cxx" > "$room/configure.log"
cmake --build "$room" > "$room/build.log" || { cat "$room/build.log"; exit 1; }
"$cxx" -std=c++17 -O1 -Isgl-kernel/csrc test/kernels/native_check.cpp -L"$room" -lsgl_kernel_cpu \
  -Wl,-rpath,"$room" -o "$room/native_check"
"$qemu" -L "$(dirname "$(dirname "$("$cxx" -print-file-name=libc.so.6)")")" "$room/native_check"
