//! Disk images, all made in the same way.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::fs::Advice;

/// What an image holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    /// Data everywhere, written and allocated.
    Full,
    /// 16 MiB of data, 16 MiB of hole, and so on.
    HalfHoles,
    /// Nothing.
    Sparse,
}

/// Makes an image of `mib` MiB and waits until it is on the device. Its data does not
/// compress; the same `content` is the same bytes each time.
pub(crate) fn make(path: &Path, mib: u64, content: Content) -> Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    file.set_len(mib << 20)?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut block = vec![0; 1 << 20];
    for number in 0..mib {
        let data = match content {
            Content::Full => true,
            Content::HalfHoles => number % 32 < 16,
            Content::Sparse => false,
        };
        if data {
            random.fill(&mut block);
            file.seek(SeekFrom::Start(number << 20))?;
            file.write_all(&block)?;
        }
    }
    file.sync_all()?;
    Ok(())
}

/// In what pieces the page cache holds an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Folios {
    /// Single pages, as small reads and writes leave it.
    Small,
    /// As large reads and writes leave it.
    Large,
}

/// Puts what is dirty on the device, and the whole file into the page cache anew.
/// ext4 looks at every page of a large folio when one is written: without this, a server
/// with a page cache is several times slower or quicker by what was done before.
pub(crate) fn cache(path: &Path, folios: Folios) -> Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    if folios == Folios::Small {
        // Without read-ahead the kernel takes single pages.
        rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
    }
    let mut block = vec![0; 1 << 20];
    while file.read(&mut block)? > 0 {}
    Ok(())
}

/// xorshift64: quick, and no compressor finds anything in it.
struct Random(u64);

impl Random {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}
