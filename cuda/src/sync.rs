//! What the copy thread blocks on and runs on: parking_lot's locks and std's threads, or with the feature `models` those
//! of a scheduler that tries one interleaving after the other.

#[cfg(not(feature = "models"))]
pub(crate) use parking_lot::{Condvar, Mutex};
#[cfg(not(feature = "models"))]
pub(crate) use std::{sync::mpsc, thread};

#[cfg(feature = "models")]
pub(crate) use self::modelled::{Condvar, Mutex};
#[cfg(feature = "models")]
pub(crate) use shuttle::{sync::mpsc, thread};

/// Shuttle's locks as parking_lot's: no poison, and waiting borrows the guard.
#[cfg(feature = "models")]
mod modelled {
    use std::ops::{Deref, DerefMut};
    use std::sync::PoisonError;
    use std::time::Duration;

    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    pub(crate) struct MutexGuard<'a, T> {
        of: &'a Mutex<T>,
        /// None only while a condition variable waits with it.
        held: Option<shuttle::sync::MutexGuard<'a, T>>,
    }

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            MutexGuard {
                of: self,
                held: Some(held),
            }
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.held.as_ref().expect("held but while waiting")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.held.as_mut().expect("held but while waiting")
        }
    }

    pub(crate) struct Condvar(shuttle::sync::Condvar);

    impl Condvar {
        pub(crate) fn new() -> Self {
            Self(shuttle::sync::Condvar::new())
        }

        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let held = guard.held.take().expect("held before waiting");
            let held = self.0.wait(held).unwrap_or_else(PoisonError::into_inner);
            guard.held = Some(held);
        }

        /// There is no time in a model: it may be over at any moment, so the lock is free for as long as the scheduler
        /// likes.
        pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) {
            guard.held = None;
            shuttle::thread::yield_now();
            guard.held = guard.of.lock().held;
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}
