// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image that is served to a machine, and the end of that.

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::micro_vm::{FaultPath, MicroVm};

use crate::PROCESSORS;
use crate::counts::Counts;
use crate::images::TestImage;

/// How a machine is made and attached.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Whether the frontend knows bounces.
    pub bounce: bool,
    /// How the machine's faults come.
    pub path: FaultPath,
    /// More arguments of the backend.
    pub backend: &'a [&'a str],
}

/// What the machines of most tests are.
pub const WITH_BOUNCES: Options<'_> = Options {
    bounce: true,
    path: FaultPath::Asynchronous,
    backend: &[],
};

/// The same with a frontend that does not know bounces.
pub const WITHOUT_BOUNCES: Options<'_> = Options {
    bounce: false,
    ..WITH_BOUNCES
};

impl Options<'_> {
    /// What the frontend is told of it.
    pub fn frontend(&self) -> FrontendOptions {
        FrontendOptions {
            bounce: self.bounce,
            ..FrontendOptions::default()
        }
    }
}

/// Backend, frontend and machine.
#[derive(Debug)]
pub struct Session {
    /// The machine. Before the others: it must not touch what nobody serves.
    pub machine: MicroVm,
    frontend: Frontend,
    backend: Backend,
}

impl Session {
    /// Serves `image` to a machine.
    pub fn start(image: &TestImage, how: Options<'_>) -> Self {
        let backend = Backend::start(&image.path, how.backend);
        let frontend = Frontend::connect(backend.socket(), &how.frontend()).unwrap();
        let machine = MicroVm::new(&frontend, PROCESSORS, how.path);
        Self {
            machine,
            frontend,
            backend,
        }
    }

    /// Ends everything well, and returns what the backend has counted.
    pub fn end(self) -> Counts {
        self.end_with(|mut backend, frontend| {
            drop(frontend);
            backend.wait_for_log("frontend detached");
            assert!(backend.terminate().success(), "{:#?}", backend.log());
            Counts::of(&backend)
        })
    }

    /// As [`Session::end`], but the backend ends while the frontend is attached.
    pub fn end_backend_first(self) -> Counts {
        self.end_with(|mut backend, _frontend| {
            assert!(backend.terminate().success(), "{:#?}", backend.log());
            Counts::of(&backend)
        })
    }

    fn end_with(self, end: impl FnOnce(Backend, Frontend) -> Counts) -> Counts {
        let Self {
            machine,
            frontend,
            backend,
        } = self;
        let repeated = machine.repeated_entries();
        drop(machine);
        let counted = frontend.mapping_counts();
        println!("  {counted:?}, {repeated} entries repeated");
        let counts = end(backend, frontend);
        counts.expect_at_least(counted);
        counts
    }
}
