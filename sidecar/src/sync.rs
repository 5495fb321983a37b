//! What the link's threads and the hooks share a state through: the usual queues, words and threads, or with the feature
//! `models` those of a scheduler that tries one interleaving after the other.

#[cfg(not(feature = "models"))]
pub(crate) use {
    crossbeam_channel::{Receiver, Sender, TrySendError, bounded},
    std::sync::atomic::AtomicU64,
    std::thread,
};

#[cfg(feature = "models")]
pub(crate) use shuttle::{
    sync::atomic::AtomicU64,
    sync::mpsc::{Receiver, SyncSender as Sender, TrySendError, sync_channel as bounded},
    thread,
};
