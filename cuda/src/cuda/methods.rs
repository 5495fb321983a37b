//! How a list of copies is put to the driver: one by one, as one batch, or as rows a constant distance apart.
//!
//! What suits depends on the copies and on the driver. One call for each costs some 3 µs of the link as well (an H200: 35 GB/s
//! of 55 at 256 KiB), which only copies of many MiB hide. A batch is one call for all, and faster from 32 KiB up; at 16 KiB to
//! the GPU it is slower, 4 GB/s against 6. Rows are one call for a block whose layers lie a constant distance apart: there
//! 16 KiB reach 36 GB/s, 64 KiB 50. `benches/results/copy-h200.json` has these figures.
//!
//! Planning is pure; everything else is one driver call after the other.

#![allow(
    unsafe_code,
    reason = "checked transfers become driver calls here, in one place"
)]

use super::codes::DriverError;
use super::driver::{Batch, Rows, Stream};
use super::registered::Transfer;
use crate::device::DevicePool;
use crate::engine::Direction;

/// Copies of this size on average go as a batch, and smaller ones as rows where at least so many make one.
const ROW_BYTES_MAX: u64 = 128 << 10;
const ROWS_WORTH: usize = 4;

/// How copies are put to the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMethod {
    /// What suits the copies and the driver.
    #[default]
    Auto,
    /// Each range by a call of its own.
    Single,
    /// All ranges in one call; one by one where the driver cannot (before 12.8).
    Batch,
    /// Ranges a constant distance apart in one call, the others by one each.
    Rows,
}

/// An enqueuing that failed.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) error: DriverError,
    /// Whether some of the copies may have been enqueued.
    pub(super) begun: bool,
}

/// How one list of copies is put to the driver.
#[derive(Debug, PartialEq)]
enum Chosen {
    Single,
    Batch,
    Rows(Vec<Rows>),
}

fn is_small(transfers: &[Transfer]) -> bool {
    let bytes: u64 = transfers.iter().map(Transfer::bytes).sum();
    bytes / kvstore::u64_from(transfers.len()) < ROW_BYTES_MAX
}

/// The methods that are left to one engine.
pub(super) struct Methods {
    wanted: CopyMethod,
    has_batch: bool,
    has_rows: bool,
    max_pitch: u64,
    batch: Batch,
}

impl Methods {
    pub(super) fn new(wanted: CopyMethod, has_batch: bool, max_pitch: u64) -> Self {
        Self {
            wanted,
            has_batch,
            has_rows: true,
            max_pitch,
            batch: Batch::default(),
        }
    }

    /// What the copies are put to the driver as.
    fn choose(&self, transfers: &[Transfer], pool: &DevicePool) -> Chosen {
        let found = || rows(transfers, self.max_pitch, pool);
        match self.wanted {
            CopyMethod::Rows if self.has_rows => Chosen::Rows(found()),
            CopyMethod::Batch if self.has_batch => Chosen::Batch,
            CopyMethod::Auto if transfers.len() > 1 => {
                if self.has_rows && (!self.has_batch || is_small(transfers)) {
                    let rows = found();
                    if !self.has_batch || rows.len() * ROWS_WORTH <= transfers.len() {
                        return Chosen::Rows(rows);
                    }
                }
                if self.has_batch {
                    Chosen::Batch
                } else {
                    Chosen::Single
                }
            }
            _ => Chosen::Single,
        }
    }

    /// Enqueues all of `transfers`, by the method that suits.
    ///
    /// # Safety
    /// The mappings that the transfers were made of stay mapped until the stream is past them.
    pub(super) unsafe fn enqueue(
        &mut self,
        stream: &Stream,
        direction: Direction,
        transfers: &[Transfer],
        pool: &DevicePool,
    ) -> Result<(), Broken> {
        match self.choose(transfers, pool) {
            Chosen::Batch => {
                self.batch.clear();
                for one in transfers {
                    self.batch.push(one.host(), one.device(), one.bytes());
                }
                // SAFETY: the addresses are those of checked transfers; the rest by the contract of this function.
                match unsafe { stream.copy_batch(direction, &mut self.batch) } {
                    Ok(()) => return Ok(()),
                    Err(error) if error.is_unsupported() => {
                        tracing::warn!(%error, "copying without batches from now on");
                        self.has_batch = false;
                    }
                    Err(error) => return Err(Broken { error, begun: true }),
                }
            }
            Chosen::Rows(rows) => {
                // SAFETY: as above: rows are made of transfers.
                match unsafe { enqueue_rows(stream, direction, &rows) } {
                    Ok(()) => return Ok(()),
                    // A driver that cannot, or that does not take two allocations for one.
                    Err(broken) if broken.error.is_unsupported() || broken.error.is_invalid() => {
                        tracing::warn!(error = %broken.error, "copying row by row from now on");
                        self.has_rows = false;
                        if broken.begun {
                            return Err(broken);
                        }
                    }
                    Err(broken) => return Err(broken),
                }
            }
            Chosen::Single => {}
        }
        // SAFETY: as above.
        unsafe { enqueue_single(stream, direction, transfers) }
    }
}

/// Enqueues one by one.
///
/// # Safety
/// As for [`Methods::enqueue`].
pub(super) unsafe fn enqueue_single(
    stream: &Stream,
    direction: Direction,
    transfers: &[Transfer],
) -> Result<(), Broken> {
    for (index, one) in transfers.iter().enumerate() {
        // SAFETY: the addresses are those of a checked transfer; the rest by the contract of this function.
        unsafe { stream.copy(direction, one.host(), one.device(), one.bytes()) }.map_err(
            |error| Broken {
                error,
                begun: index > 0,
            },
        )?;
    }
    Ok(())
}

/// # Safety
/// As for [`Methods::enqueue`]; each row is a transfer.
unsafe fn enqueue_rows(stream: &Stream, direction: Direction, rows: &[Rows]) -> Result<(), Broken> {
    for (index, one) in rows.iter().enumerate() {
        // SAFETY: by the contract of this function.
        let end = unsafe {
            if one.count == 1 {
                stream.copy(direction, one.host, one.device, one.bytes)
            } else {
                stream.copy_rows(direction, one)
            }
        };
        end.map_err(|error| Broken {
            error,
            begun: index > 0,
        })?;
    }
    Ok(())
}

/// Joins neighbours of the list that are equal in size and a constant distance apart on both sides. The driver looks at all
/// between the first and the last row, so that has to lie in one registration and one stretch of the pool.
fn rows(transfers: &[Transfer], max_pitch: u64, pool: &DevicePool) -> Vec<Rows> {
    let mut out: Vec<Rows> = Vec::new();
    let mut piece = None;
    for one in transfers {
        let joined = out
            .last()
            .filter(|_| piece == Some(one.piece()))
            .and_then(|last| extended(last, one, max_pitch))
            .filter(|rows| {
                let between = (rows.count - 1) * rows.device_pitch;
                pool.contains(rows.device, between + rows.bytes)
            });
        match (joined, out.last_mut()) {
            (Some(joined), Some(last)) => *last = joined,
            _ => out.push(Rows {
                host: one.host(),
                device: one.device(),
                host_pitch: one.bytes(),
                device_pitch: one.bytes(),
                bytes: one.bytes(),
                count: 1,
            }),
        }
        piece = Some(one.piece());
    }
    out
}

/// `rows` with `next` as one more, if it is where that one would be.
fn extended(rows: &Rows, next: &Transfer, max_pitch: u64) -> Option<Rows> {
    let (host_pitch, device_pitch) = if rows.count == 1 {
        (
            next.host().checked_sub(rows.host)?,
            next.device().checked_sub(rows.device)?,
        )
    } else {
        (rows.host_pitch, rows.device_pitch)
    };
    let place = |start: u64, pitch: u64| rows.count.checked_mul(pitch)?.checked_add(start);
    let allowed = rows.bytes..=max_pitch;
    let fits = next.bytes() == rows.bytes
        && place(rows.host, host_pitch) == Some(next.host())
        && place(rows.device, device_pitch) == Some(next.device())
        && allowed.contains(&host_pitch)
        && allowed.contains(&device_pitch);
    fits.then_some(Rows {
        host_pitch,
        device_pitch,
        count: rows.count + 1,
        ..*rows
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testkit::paper_pool;

    const HOST: u64 = 1 << 40;
    const DEVICE: u64 = 1 << 41;

    /// Transfers of blocks whose layers are strided, in the order in which `ranges` makes them, some of them cut.
    fn layouts() -> impl Strategy<Value = (Vec<Transfer>, u64)> {
        let sizes = (1..5_u64, 1..6_u64, 1..9_u64, 0..4_u64);
        let blocks = prop::collection::vec((0..9_u64, 0..9_u64), 1..6);
        (sizes, blocks, 1..200_u64, 1..80_u64).prop_map(
            |((layers, odd, bytes, gap), blocks, piece_bytes, max_pitch)| {
                let layer_stride = 10 * (bytes + gap);
                let mut transfers = Vec::new();
                for (slot, block) in blocks {
                    for layer in 0..layers {
                        let offset = (slot * layers + layer) * bytes;
                        let bytes = if layer == odd {
                            bytes.div_ceil(2)
                        } else {
                            bytes
                        };
                        transfers.push(Transfer::on_paper(
                            HOST + offset,
                            DEVICE + layer * layer_stride + block * (bytes + gap),
                            bytes,
                            offset / piece_bytes,
                        ));
                    }
                }
                (transfers, max_pitch)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn rows_are_the_transfers_in_their_order((transfers, max_pitch) in layouts(), hole in any::<bool>()) {
            // One stretch of pool, or two with a hole between them, which no rows may reach over.
            let pool = if hole {
                paper_pool(&[(DEVICE, 20, 20), (DEVICE + 21, 4000, 4000)], 1)
            } else {
                paper_pool(&[(DEVICE, 4000, 4000)], 1)
            };
            let mut left = transfers.iter();
            for rows in rows(&transfers, max_pitch, &pool) {
                let mut pieces = Vec::new();
                for row in 0..rows.count {
                    let one = left.next().expect("as many rows as transfers");
                    prop_assert_eq!(one.host(), rows.host + row * rows.host_pitch);
                    prop_assert_eq!(one.device(), rows.device + row * rows.device_pitch);
                    prop_assert_eq!(one.bytes(), rows.bytes);
                    pieces.push(one.piece());
                }
                if rows.count > 1 {
                    prop_assert!(pieces.iter().all(|piece| *piece == pieces[0]));
                    prop_assert!(rows.host_pitch <= max_pitch && rows.device_pitch <= max_pitch);
                    prop_assert!(rows.host_pitch >= rows.bytes && rows.device_pitch >= rows.bytes);
                    let between = (rows.count - 1) * rows.device_pitch;
                    prop_assert!(pool.contains(rows.device, between + rows.bytes));
                }
            }
            prop_assert!(left.next().is_none());
        }
    }

    #[test]
    fn the_layers_of_a_block_are_rows() {
        let layer = |n: u64| Transfer::on_paper(HOST + 64 * n, DEVICE + 1000 * n, 64, 0);
        let other =
            |n: u64| Transfer::on_paper(HOST + 5000 + 64 * n, DEVICE + 128 + 1000 * n, 64, 0);
        let pool = paper_pool(&[(DEVICE, 100_000, 100_000)], 1);
        let all: Vec<_> = (0..4).map(layer).chain((0..4).map(other)).collect();
        let counts = |list: &[Rows]| list.iter().map(|rows| rows.count).collect::<Vec<_>>();
        let found = rows(&all, 1 << 31, &pool);
        assert_eq!(counts(&found), [4, 4]);
        assert_eq!((found[1].host_pitch, found[1].device_pitch), (64, 1000));
        assert_eq!(counts(&rows(&all, 999, &pool)), [1; 8], "too far apart");
    }

    #[test]
    fn copies_and_driver_decide() {
        let pool = paper_pool(&[(DEVICE, 1 << 40, 1 << 40)], 1);
        // Layers of one block; or blocks in an order in which nothing is a constant distance apart.
        let layers = |count: u64, bytes: u64| -> Vec<Transfer> {
            (0..count)
                .map(|n| Transfer::on_paper(HOST + n * bytes, DEVICE + 2 * n * bytes, bytes, 0))
                .collect()
        };
        let scattered = |count: u64, bytes: u64| -> Vec<Transfer> {
            (0..count)
                .map(|n| Transfer::on_paper(HOST + n * bytes, DEVICE + n * n * 2 * bytes, bytes, 0))
                .collect()
        };
        let lists = [
            layers(1, 4096),
            layers(8, 65_536),
            scattered(8, 65_536),
            layers(8, ROW_BYTES_MAX),
        ];
        let chosen = |wanted, has_batch, has_rows| {
            let mut methods = Methods::new(wanted, has_batch, 1 << 31);
            methods.has_rows = has_rows;
            lists
                .each_ref()
                .map(|list| match methods.choose(list, &pool) {
                    Chosen::Single => Single,
                    Chosen::Batch => Batch,
                    Chosen::Rows(_) => Rows,
                })
        };
        use CopyMethod::{Auto, Batch, Rows, Single};
        assert_eq!(chosen(Auto, true, true), [Single, Rows, Batch, Batch]);
        assert_eq!(chosen(Auto, true, false), [Single, Batch, Batch, Batch]);
        assert_eq!(chosen(Auto, false, true), [Single, Rows, Rows, Rows]);
        assert_eq!(chosen(Auto, false, false), [Single; 4]);
        assert_eq!(chosen(Batch, true, true), [Batch; 4]);
        assert_eq!(chosen(Batch, false, true), [Single; 4]);
        assert_eq!(chosen(Rows, true, true), [Rows; 4]);
        assert_eq!(chosen(Rows, true, false), [Single; 4]);
        assert_eq!(chosen(Single, true, true), [Single; 4]);
    }
}
