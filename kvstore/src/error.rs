//! What can go wrong, named by what the caller does next. Never holds a block's content or a path of the machine.

use std::io;

use thiserror::Error;

/// Refusals of the store. None of them changes what is stored, unless its text says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The namespace has been reset (or replaced) since the handle was given: open it again, expect misses.
    #[error("the namespace was reset; open it again")]
    StaleNamespace,
    /// No such lease or reservation: released before, or never given. Drop it.
    #[error("unknown lease: released before, or never given")]
    UnknownLease,
    /// The lease belongs to another engine. A defect in the caller, nothing was changed.
    #[error("the lease belongs to another owner")]
    WrongOwner,
    /// It ended by time or because its owner left. A commit that gets this published nothing, and its slots are free again.
    #[error("the lease had ended before")]
    LeaseExpired,
    /// No such pin: unpinned, expired, broken, or its namespace was reset.
    #[error("unknown pin: ended before, or never given")]
    UnknownPin,
    /// A table is full: try again when others have let go.
    #[error("too many {what}: the limit is {limit}")]
    TooMany {
        /// Which table, as a plural.
        what: &'static str,
        /// Its configured size.
        limit: usize,
    },
    /// A configuration or geometry that cannot work; `field` names the culprit.
    #[error("{field} {rule}")]
    BadConfig {
        /// Name of the field.
        field: &'static str,
        /// What it has to be.
        rule: &'static str,
    },
}

/// Why an arena could not be made or mapped.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// Fewer free 2 MiB pages than asked for.
    #[error(
        "the arena needs {needed} huge pages of 2 MiB, but {available} are available of the {reserved} that this machine \
         reserves; run `sysctl -w vm.nr_hugepages={advised}` as root, or use 4 KiB pages"
    )]
    NoHugePages {
        /// Pages the arena needs.
        needed: u64,
        /// Pages that are neither in use nor promised to others.
        available: u64,
        /// Pages the machine keeps in all.
        reserved: u64,
        /// What `vm.nr_hugepages` has to be for this arena to fit.
        advised: u64,
    },
    /// The kernel has no memory for it, or the container's limit is below it.
    #[error(
        "no memory for an arena of {bytes} bytes: make it smaller, or raise the limit of the machine or container"
    )]
    OutOfMemory {
        /// Size asked for.
        bytes: u64,
    },
    /// The size is zero or no multiple of the page size.
    #[error(
        "an arena of {bytes} bytes is no multiple of its page size ({page_bytes} bytes), or empty"
    )]
    BadSize {
        /// Size asked for.
        bytes: u64,
        /// Page size asked for.
        page_bytes: u64,
    },
    /// Whoever made this file could still resize it under us, or has forbidden writing: not an arena of ours.
    #[error("the descriptor is not sealed as an arena is")]
    NotSealed,
    /// The file has another size than was announced.
    #[error("the arena's file has {actual} bytes, {expected} were announced")]
    WrongSize {
        /// Announced size in bytes.
        expected: u64,
        /// Size of the file in bytes.
        actual: u64,
    },
    /// Anything else the kernel said.
    #[error("{operation} failed: {source}")]
    System {
        /// The call that failed.
        operation: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}
