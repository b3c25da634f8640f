//! CRC-32C (Castagnoli, RFC 3720), the checksum of everything that is kept or sent.

use crc_fast::{CrcAlgorithm, Digest};

const CRC: CrcAlgorithm = CrcAlgorithm::Crc32Iscsi;

/// Of `data`.
pub fn crc32c(data: &[u8]) -> u32 {
    crc_fast::checksum(CRC, data) as u32
}

/// Of something whose checksum is `crc`, and `data` behind it.
pub fn crc32c_append(crc: u32, data: &[u8]) -> u32 {
    // What the digest starts from is not inverted yet.
    let mut digest = Digest::new_with_init_state(CRC, u64::from(!crc));
    digest.update(data);
    digest.finalize() as u32
}

/// Of something whose checksum is `crc`, and of `len` bytes behind it whose own is `next`.
pub fn crc32c_combine(crc: u32, next: u32, len: usize) -> u32 {
    crc_fast::checksum_combine(CRC, u64::from(crc), u64::from(next), len as u64) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_that_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&[]), 0);
    }

    proptest! {
        #[test]
        fn it_is_what_another_implementation_says(
            data in proptest::collection::vec(any::<u8>(), 0..20_000), at in any::<usize>(),
        ) {
            let (crc, at) = (::crc32c::crc32c(&data), at % (data.len() + 1));
            let (begin, end) = data.split_at(at);
            prop_assert_eq!(crc32c(&data), crc);
            prop_assert_eq!(crc32c_append(crc32c(begin), end), crc);
            prop_assert_eq!(crc32c_combine(crc32c(begin), crc32c(end), end.len()), crc);
        }
    }
}
