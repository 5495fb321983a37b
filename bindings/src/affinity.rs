//! Where threads may run.
//!
//! vLLM's CPU worker pins its main thread to one CPU and computes on it, and a new thread inherits that. Copies would
//! take turns with the model there, while other CPUs idle.

use rustix::process::getppid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Runs `start` on a thread that may run wherever this process's parent may, if this thread is pinned to one CPU and the
/// parent is not pinned to the same; else here.
/// The threads that `start` makes inherit it. This thread's own affinity stays.
pub(crate) fn unpinned<T: Send>(start: impl FnOnce() -> T + Send) -> T {
    let Some(wider) = wider() else {
        return start();
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            if let Err(error) = sched_setaffinity(None, &wider) {
                tracing::info!(%error, "copies stay on the CPU of the model");
            }
            start()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The parent's CPUs, if they are others than this thread's only one and may be known.
fn wider() -> Option<CpuSet> {
    let own = sched_getaffinity(None).ok()?;
    let parent = sched_getaffinity(Some(getppid()?)).ok()?;
    (own.count() == 1 && parent != own).then_some(parent)
}
