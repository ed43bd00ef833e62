// Many small blocks of one size: an index takes 4 bytes, and what outgrown blocks took is freed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace quasar {

constexpr uint32_t kNoIndex = 0xffffffffu;

// Blocks of one size, by index; in chunks, which are freed when all of their blocks were given back.
class Slab {
 public:
  void start(uint32_t block_bytes, uint32_t chunk_bytes) {
    bytes_ = block_bytes;
    while (bytes_ << (shift_ + 1) <= chunk_bytes) ++shift_;
  }

  char* at(uint32_t index) const { return block(index >> shift_, index & (chunk() - 1)); }

  // 0, 1, 2, … where none is given back. False where there is no memory.
  bool take(uint32_t* index) {
    if (open_ == kNoIndex && !add_chunk()) return false;
    Header& header = header_of(open_);
    *index = open_ << shift_ | header.free;
    std::memcpy(&header.free, at(*index), sizeof header.free);
    if (++header.used == chunk()) close(open_);
    return true;
  }

  void give(uint32_t index) {
    const uint32_t number = index >> shift_;
    Header& header = header_of(number);
    if (header.used == chunk()) open(number);
    std::memcpy(at(index), &header.free, sizeof header.free);
    header.free = index & (chunk() - 1);
    if (--header.used == 0) {
      close(number);
      std::free(chunks_[number]);
      --held_;
      chunks_[number] = as_address(vacant_);
      vacant_ = number;
    }
  }

  // Without blocks; the first chunk of those that never gave one back can stay, so that it needs no memory to go on.
  void clear(bool keep_chunk) {
    while (vacant_ != kNoIndex) {
      char** place = chunks_ + vacant_;
      vacant_ = as_number(*place);
      *place = nullptr;
    }
    for (uint32_t i = keep_chunk ? 1 : 0; i < num_chunks_; ++i) std::free(chunks_[i]);
    open_ = kNoIndex;
    num_chunks_ = held_ = keep_chunk ? 1 : 0;
    if (keep_chunk) {
      make_chunk(0);
      // Where even less memory is not to be had, the longer array stays.
      if (char** chunks = static_cast<char**>(std::realloc(chunks_, sizeof(char*)))) {
        chunks_ = chunks;
        room_ = 1;
      }
    } else {
      std::free(chunks_);
      chunks_ = nullptr;
      room_ = 0;
    }
  }

  size_t held() const { return held_ * chunk_bytes() + room_ * sizeof(char*); }

 private:
  // Of a chunk: its blocks in use, the first free one, and its neighbours among the chunks that have free ones. A free
  // block begins with the number of the next one.
  struct Header {
    uint32_t used, free, next, previous;
  };

  uint32_t chunk() const { return 1u << shift_; }
  size_t chunk_bytes() const { return sizeof(Header) + (size_t{bytes_} << shift_); }
  char* block(uint32_t number, uint32_t place) const {
    return chunks_[number] + sizeof(Header) + size_t{bytes_} * place;
  }
  Header& header_of(uint32_t number) const { return *reinterpret_cast<Header*>(chunks_[number]); }

  // Chunks that were freed form a list in place of their addresses.
  static char* as_address(uint32_t number) { return reinterpret_cast<char*>(static_cast<uintptr_t>(number)); }
  static uint32_t as_number(char* address) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address)); }

  bool add_chunk() {
    char* memory = static_cast<char*>(std::malloc(chunk_bytes()));
    if (memory == nullptr) return false;
    uint32_t number = vacant_;
    if (number != kNoIndex) {
      vacant_ = as_number(chunks_[number]);
    } else {
      if (num_chunks_ == room_) {
        const uint32_t room = room_ + room_ / 4 + 1;
        char** chunks = static_cast<char**>(std::realloc(chunks_, room * sizeof(char*)));
        if (chunks == nullptr) {
          std::free(memory);
          return false;
        }
        chunks_ = chunks;
        room_ = room;
      }
      number = num_chunks_++;
    }
    ++held_;
    chunks_[number] = memory;
    make_chunk(number);
    return true;
  }

  void make_chunk(uint32_t number) {
    header_of(number) = {0, 0, kNoIndex, kNoIndex};
    for (uint32_t i = 1; i <= chunk(); ++i) std::memcpy(block(number, i - 1), &i, sizeof i);
    open(number);
  }

  void open(uint32_t number) {
    header_of(number).next = open_;
    header_of(number).previous = kNoIndex;
    if (open_ != kNoIndex) header_of(open_).previous = number;
    open_ = number;
  }

  void close(uint32_t number) {
    const Header& header = header_of(number);
    if (header.next != kNoIndex) header_of(header.next).previous = header.previous;
    (header.previous != kNoIndex ? header_of(header.previous).next : open_) = header.next;
  }

  uint32_t bytes_ = 0, shift_ = 0;
  uint32_t open_ = kNoIndex, vacant_ = kNoIndex;
  uint32_t num_chunks_ = 0, held_ = 0, room_ = 0;  // chunks that ever were, that are, and that `chunks_` has room for
  char** chunks_ = nullptr;
};

}  // namespace quasar
