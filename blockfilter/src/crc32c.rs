//! CRC-32C (Castagnoli, RFC 3720), the checksum of everything that is kept or sent.
//!
//! By `crc-fast` where it has its wide multiplications. Elsewhere that would be tables, and on aarch64
//! instructions whose presence it does not check, while `crc32c` makes use of SSE 4.2 and of the CRC
//! extension alone.

use crc_fast::{CrcAlgorithm, Digest};

const CRC: CrcAlgorithm = CrcAlgorithm::Crc32Iscsi;

/// Of `data`.
pub fn crc32c(data: &[u8]) -> u32 {
    if is_wide() { crc_fast::checksum(CRC, data) as u32 } else { ::crc32c::crc32c(data) }
}

/// Of something whose checksum is `crc`, and `data` behind it.
pub fn crc32c_append(crc: u32, data: &[u8]) -> u32 {
    if crc == 0 {
        // That of nothing: there is nothing to go on from.
        return crc32c(data);
    }
    if !is_wide() {
        return ::crc32c::crc32c_append(crc, data);
    }
    // What the digest starts from is not inverted yet.
    let mut digest = Digest::new_with_init_state(CRC, u64::from(!crc));
    digest.update(data);
    digest.finalize() as u32
}

#[cfg(target_arch = "x86_64")]
fn is_wide() -> bool {
    is_x86_feature_detected!("pclmulqdq") && is_x86_feature_detected!("sse4.2")
}

#[cfg(not(target_arch = "x86_64"))]
const fn is_wide() -> bool {
    false
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
        fn both_implementations_say_the_same(
            data in proptest::collection::vec(any::<u8>(), 0..20_000), at in any::<usize>(),
        ) {
            let (crc, at) = (::crc32c::crc32c(&data), at % (data.len() + 1));
            let (begin, end) = data.split_at(at);
            prop_assert_eq!(crc32c(&data), crc);
            prop_assert_eq!(crc32c_append(crc32c(begin), end), crc);
        }
    }
}
